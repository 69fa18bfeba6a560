# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test file shares."""

from __future__ import annotations

import gc
import os
import re
import sys
from pathlib import Path

# before anything imports the hub's client: a test that reaches for the network should fail at once
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

HERE = Path(__file__).parent
# tests that run as scripts of their own find the helpers here, and cases that others use in their folders
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), *(str(HERE / name) for name in ("graphs", "ops", "parity", "runtime"))]
    + [os.environ[name] for name in ("PYTHONPATH",) if os.environ.get(name)]
)

# the same examples on every machine; no deadline, for CI machines are shared
settings.register_profile("fastcache", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("fastcache")


# What `make test-fast` leaves out beside tests that are marked themselves: files whose every test is slow. Those of
# "gate", which show without a GPU what kernels would do on one, and of "bench" have targets of their own, ...
SLOW = {
    "gate": (
        "cuda_build", "cuda_emulation", "gpu_code", "gpu_kit", "gpu_pretended", "gpu_run", "model_kernels",
        "native_cuda", "triton_aot", "triton_counters", "triton_gpu", "triton_interpreter", "triton_launcher",
        "triton_layouts", "triton_offsets", "triton_sass",
    ),
    "bench": (
        "bench", "bench_engines", "bench_methods", "bench_models", "load", "pictures", "pictures_student",
    ),
    "parity": ("parity", "diffusers_presets", "matrix", "pipelines"),
    "slow": (
        "captured_reuse", "compile", "compile_gpu", "compiled_matrix", "demo_model", "docs",
        "export", "field_doors", "field_facts", "field_pipelines", "generated_code", "mixed_compiled",
        "on_device", "packaging", "ranks", "ranks_killed", "serve", "state_machine",
        "static_addresses", "transfers",
    ),
}  # fmt: skip
# ... and single tests: those that compile, by what their names or parameters say, and a few long ones.
LONG = re.compile(
    r"compile|frozen|graph|interpreter|inductor|triton_launcher|keep_their_lead|every_recipe_comes_back|"
    r"loaded_recipe_gives|tunes_the_shipped|pipeline_is_tuned|guided_beats|memory_is_flat|foretold_to_the_byte|shows_two_lists|several_rules",
    re.IGNORECASE,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long: `slow`, `parity` too where it runs diffusers' own methods beside ours, and `gate`."""
    marks = {f"test_{name}": mark for mark, names in SLOW.items() for name in names}
    for item in items:
        if mark := marks.get(item.path.stem):
            item.add_marker(mark)
        if mark or LONG.search(item.name):
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="module")
def graphs_of_its_own():
    """Torch counts what is compiled of one function over a whole process: no file counts against another.

    Nor does the collector go through what earlier files have left alive, which takes it seconds in the end.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """pytest-xdist runs one process per core; more threads would only fight for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
