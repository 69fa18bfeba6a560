# SPDX-License-Identifier: Apache-2.0
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

HERE = Path(__file__).parents[1]  # where the helpers are
FIVE = ("mag", "first_block", "taylorseer", "pab", "faster")
METHODS = {
    "Wan3D": (*FIVE, "interval_taylor2", "interval_guided", "interval_checked", "on_device"),
    "Flux": FIVE,
}
# Kernels that a computed step has above the uncached ones, two blocks per list; none where there is no row.
# What docs/decisions/2026-11-28-stores.md says of each: what Flux' single blocks store, they also concatenate,
# in a kernel that then is two; a guide is every n-th token, so other threads than those of what makes it.
MORE = {
    **{("Flux", method): 2 for method in ("taylorseer", "pab", "faster")},
    ("Wan3D", "interval_guided"): 1,
    ("Wan3D", "interval_checked"): 1,
}
# FirstBlock's two programs: streams that the cut between them materialises, and what the embedders take, which
# run twice, in kernels and in matrix products and convolutions.
STREAMS = {"Wan3D": 1, "Flux": 2}
EMBEDDERS = {"Wan3D": (5, 7), "Flux": (6, 6)}


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
        kernels, extern = MORE.get((name, method), 0), 0
        if method == "first_block":
            kernels, extern = EMBEDDERS[name]
            kernels += STREAMS[name]
        assert sum(p["kernels"] for p in computed.values()) == plain["kernels"] + kernels
        assert sum(p["extern"] for p in computed.values()) == plain["extern"] + extern
        moves = sum(p["moves"] for p in computed.values())
        assert moves <= plain["moves"], "a clone, or a copy back"
        assert reused[0]["kernels"] < plain["kernels"] and reused[0]["moves"] <= plain["moves"]
    if decided is not None:  # what `compile` says of on_device, and faults that this test must find
        (program,) = decided.values()
        assert program["reads"] == 1 and program["partitions"] == 2
        assert program["disabled"].startswith("control flow operator: torch.cond")
        assert len(faults(program)) == 3
