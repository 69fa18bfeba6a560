# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: compiled and disassembled. `test_cuda_emulation.py` runs them.

None of this replaces a run on a GPU: it cannot see memory ordering, launch failures or speed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
NVCC = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")
CXX = shutil.which("c++")
REGISTERS = 64  # what lets four blocks of 256 threads share an SM

needs_nvcc = pytest.mark.skipif(
    NVCC is None or not SOURCES, reason="needs nvcc and the source tree"
)
needs_cxx = pytest.mark.skipif(
    CXX is None or not SOURCES, reason="needs a C++ compiler and sources"
)


def run(*command: object) -> str:
    """What the command says; its failure fails the test with that text."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- nvcc -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SOURCES, ids=lambda p: p.stem)
def compiled(request, tmp_path_factory) -> tuple[Path, str]:
    """A cubin for sm_90 and ptxas' resource report."""
    cubin = tmp_path_factory.mktemp("cubin") / f"{request.param.stem}.cubin"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "-arch=sm_90", "-cubin"]
    return cubin, run(NVCC, *flags, request.param, "-o", cubin)


@needs_nvcc
def test_kernels_spill_nothing_and_leave_room_for_four_blocks(compiled):
    _, report = compiled
    used = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report)
    assert used and max(used) <= REGISTERS
    assert len(spills) == len(used) and all(set(s) == {"0"} for s in spills)


def disassembler() -> Path | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return tool if tool.exists() else None


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="needs the disassembler in the triton wheel")
def test_aligned_kernels_move_16_bytes_at_a_time_and_no_float_is_added_atomically(compiled):
    cubin, _ = compiled
    code = run(disassembler(), "-c", cubin)
    assert set(re.findall(r"\b(?:ATOM|RED)[.\w]*", code)) <= {"ATOMG.E.INC.STRONG.GPU"}
    bodies = re.split(r"//-+ \.text\.(\w+) -+", code)[1:]
    for name, body in zip(bodies[::2], bodies[1::2], strict=True):
        aligned = re.search(r"Lb([01])E(?:Li(\d)E)?", name)  # kernel<T, ALIGNED, COUNT>
        if aligned is None or aligned[1] == "0":
            continue
        wide = len(re.findall(r"LDG\.E\.128", body)), len(re.findall(r"STG\.E\.128", body))
        assert wide[0] >= int(aligned[2] or 3) and wide[1] >= 1, f"{name}: {wide}"


@needs_cxx
def test_the_binding_compiles_against_the_stable_abi():
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-isystem", include]
    macros = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    run(CXX, *flags, *macros, CUDA / "ops.cpp")
