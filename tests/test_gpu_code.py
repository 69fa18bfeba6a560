"""The code that Inductor would run on a GPU, written on a machine without one: no device is asked, nothing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
METHODS = {
    "Wan3D": (
        *("mag", "first_block", "taylorseer", "pab", "faster", "interval_taylor2"),
        *("interval_guided", "on_device"),
    ),
    "Flux": ("mag", "first_block", "taylorseer"),
}
# Kernels that a computed step has above the uncached ones, two blocks per list. Writes into storage stand at a
# graph's end, where Inductor fuses them with no kernel that is more than 64 nodes away: what is stored early in
# a step is a kernel of its own, at most one per tensor, which Flux' attention returns six of. FirstBlock
# enters the model twice, so that its embedders run twice, and the two sums are copied to their place.
MORE = {
    ("Wan3D", "taylorseer"): 1,
    ("Wan3D", "pab"): 1,
    ("Wan3D", "interval_guided"): 1,
    ("Wan3D", "first_block"): 7,
    ("Flux", "taylorseer"): 6,
    ("Flux", "first_block"): 9,
}
EMBEDDERS = {"Wan3D": 7, "Flux": 6}  # their matrix products and convolutions


def lowered(name: str, folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Per method, what Inductor's source of each program holds."""
    command = [sys.executable, "-W", "ignore", str(HERE / "absent_gpu.py"), str(folder), name]
    ran = subprocess.run(
        [*command, "uncached", *METHODS[name]],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )
    assert not ran.returncode, ran.stderr[-4000:]
    return json.loads(ran.stdout)


def faults(program: dict[str, Any]) -> list[str]:
    """What would keep a program from being one captured graph."""
    found = {
        "CUDA graphs are off": program["disabled"],
        "it is cut": program["partitions"] != 1,
        "it waits for the device": program["reads"],
        "it writes into inputs that may move": program["loose"],
    }
    return [f"{text}: {program}" for text, wrong in found.items() if wrong]


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available() or torch.__version__ < "2.13",
    reason="pretends, by torch 2.13's inside",
)
@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_one_graph_with_no_more_kernels_than_it_needs(
    name: str, tmp_path: Path
) -> None:
    found = lowered(name, tmp_path)
    (plain,) = found.pop("uncached").values()
    decided = found.pop("on_device", None)
    assert not faults(plain) and not plain["mutated"]
    for method, programs in found.items():
        computed = {label: p for label, p in programs.items() if "reuse" not in label}
        reused = [p for label, p in programs.items() if "reuse" in label]
        assert len(computed) == (2 if method == "first_block" else 1) and len(reused) == 1
        assert not [fault for program in programs.values() for fault in faults(program)]
        assert all(program["mutated"] for program in computed.values()), "nothing is stored"
        assert sum(p["kernels"] for p in computed.values()) <= plain["kernels"] + MORE.get(
            (name, method), 0
        )
        twice = method == "first_block"
        assert (
            sum(p["extern"] for p in computed.values()) <= plain["extern"] + twice * EMBEDDERS[name]
        )
        moves = sum(p["moves"] for p in computed.values())
        assert moves <= plain["moves"] + twice, "a clone, or a copy back"
        assert reused[0]["kernels"] < plain["kernels"] and reused[0]["moves"] <= plain["moves"]
    if decided is not None:  # what `compile` says of on_device, and faults that this test must find
        (program,) = decided.values()
        assert program["reads"] == 1 and program["partitions"] == 2
        assert program["disabled"].startswith("control flow operator: torch.cond")
        assert len(faults(program)) == 3
