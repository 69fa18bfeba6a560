"""The CUDA kernels without a GPU: compiled, disassembled, and emulated on the host.

None of this replaces a run on a GPU: it cannot see memory ordering, launch failures or speed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastcache.ops import reference

ROOT = Path(__file__).parent.parent
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


# --- emulation --------------------------------------------------------------------------------

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("samples", "length", "width")]


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int), ("stride", ctypes.c_int64)]


class Terms(ctypes.Structure):
    _fields_ = [
        ("tensor", Operand * 5),
        ("weight", ctypes.c_float * 5),
        ("device_weight", ctypes.c_void_p),
        ("count", ctypes.c_int),
    ]


class Workspace(ctypes.Structure):
    _fields_ = [("counter", ctypes.c_void_p), ("partial", ctypes.c_void_p)]


def operand(t: torch.Tensor | None) -> Operand:
    return (
        Operand(t.data_ptr(), TYPES[t.dtype], t.stride(0)) if t is not None else Operand(None, 0, 0)
    )


def shape(t: torch.Tensor) -> Shape:
    return Shape(t.shape[0], t[0].numel(), t.shape[-1])


ENTRY = """
using namespace fastcache;
using cuda::Terms, cuda::Workspace;
void check(const char* error) { if (error) throw error; }
extern "C" {
void l1(int t, Shape s, Operand y, Operand x, Operand p, Operand o, bool each,
        float* to, Workspace w) {
  check(cuda::residual_l1(Type(t), s, y, x, p, o, each, to, w, nullptr));
}
void magnitude(int t, Shape s, Operand y, Operand x, Operand p, Operand o, double eps, bool each,
               float* to, Workspace w) {
  check(cuda::residual_magnitude(Type(t), s, y, x, p, o, eps, each, to, w, nullptr));
}
void combine(int t, Shape s, Operand o, const Terms* terms) {
  check(cuda::linear_combine(Type(t), s, o, *terms, nullptr));
}
void decide(const float* sums, double threshold, int32_t* flag, uint64_t node) {
  check(cuda::decide(sums, threshold, flag, node, nullptr));
}
uint64_t* last_condition() { return condition; }
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    """The kernels as host code behind C functions."""
    folder = tmp_path_factory.mktemp("emulated")
    for name in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).touch()
    text = f'#include "{CUDA}/emulation.h"\n'
    for source in SOURCES:
        # kernel<<<grid, threads, 0, stream>>>(...) -> emulation::launch(kernel, grid, threads)(...)
        launch = re.sub(
            r"(\w+)<<<(\w+), (\w+), 0, .*?>>>\(",
            r"emulation::launch(\1, \2, \3)(",
            source.read_text(),
        )
        # each file has its own anonymous `kernel`
        text += f"#define kernel kernel_{source.stem}\n#define add add_{source.stem}\n"
        text += f"{launch}\n#undef kernel\n#undef add\n"
    text += ENTRY
    (folder / "all.cpp").write_text(text)
    library = folder / "all.so"
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off"]
    run(CXX, *flags, f"-I{folder}", f"-I{CUDA}", folder / "all.cpp", "-o", library)
    loaded = ctypes.CDLL(str(library))
    loaded.last_condition.restype = ctypes.POINTER(ctypes.c_uint64)
    return loaded


def rows(shape, dtype, seed, align, gap=0):
    """A [B, T, C] view with `gap` elements between samples, at an aligned address or not."""
    batch, length = shape[0], shape[1] * shape[2]
    storage = torch.full((batch * (length + gap) + 16,), 77.0).to(dtype)
    view = storage[0 if align else 1 :].as_strided(shape, (length + gap, shape[2], 1))
    view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return view


LAYOUTS = [  # shape, aligned, elements between samples
    ((1, 1, 1), True, 0),
    ((1, 7, 96), True, 0),
    ((2, 3, 40), True, 24),
    ((3, 5, 31), True, 0),
    ((2, 9, 64), False, 5),
    ((1, 40, 512), True, 0),
]


@needs_cxx
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_emulated_metrics_match_the_reference_and_leave_the_counter_at_zero(
    emulated, dtype, layout
):
    size, align, gap = layout
    y, x, prev, out = (rows(size, dtype, i, align, gap) for i in range(4))
    memory = torch.zeros(1 + 2 * 65536, dtype=torch.int64)
    workspace = Workspace(memory.data_ptr(), memory.data_ptr() + 8)
    arguments = (TYPES[dtype], shape(y), *map(operand, (y, x, prev)))
    for per_sample in (False, True):
        got = torch.full((size[0] if per_sample else 1, 2), torch.nan)
        expected = torch.empty_like(out)
        truth = reference.residual_l1(y, x, prev, expected, per_sample).reshape(-1, 2)
        out.fill_(torch.nan)
        where = ctypes.c_void_p(got.data_ptr())
        emulated.l1(*arguments, operand(out), per_sample, where, workspace)
        torch.testing.assert_close(got, truth, rtol=2e-6, atol=0)
        assert torch.equal(out, expected) and memory[0] == 0

        got = torch.full((size[0] if per_sample else 1, 1), torch.nan)
        truth = reference.residual_magnitude(y, x, prev, None, 1e-8, per_sample).reshape(-1, 1)
        where, eps = ctypes.c_void_p(got.data_ptr()), ctypes.c_double(1e-8)
        emulated.magnitude(*arguments, operand(None), eps, per_sample, where, workspace)
        torch.testing.assert_close(got, truth, rtol=2e-6, atol=0)
        assert memory[0] == 0
    around = out.as_strided((size[0] * (size[1] * size[2] + gap),), (1,))
    assert (around == 77.0).sum() == size[0] * gap  # nothing was written between the samples


@needs_cxx
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_emulated_weighted_sums_have_the_bits_of_the_reference(emulated, dtype, layout, count):
    size, align, gap = layout
    tensors = [rows(size, dtype, i, align, gap) for i in range(count)]
    weights = torch.tensor([0.3, -1.7, 2.2, 0.9, -0.4][:count])
    expected = torch.empty(size, dtype=dtype)
    reference.linear_combine(expected, tensors, weights)
    for device in (False, True):
        out = rows(size, dtype, 9, align, gap)
        terms = Terms(count=count, device_weight=weights.data_ptr() if device else None)
        for i, t in enumerate(tensors):
            terms.tensor[i] = operand(t)
            terms.weight[i] = 0.0 if device else float(weights[i])
        emulated.combine(TYPES[dtype], shape(out), operand(out), ctypes.byref(terms))
        assert torch.equal(out, expected)


@needs_cxx
@pytest.mark.parametrize(
    "sums, compute",
    [((0.1, 1.0), 0), ((0.12, 1.0), 1), ((0.0, 0.0), 1), ((1.0, 0.0), 1), ((torch.nan, 1.0), 1)],
)
def test_emulated_decision_reuses_only_at_or_below_the_threshold(emulated, sums, compute):
    values, flag = torch.tensor(sums), torch.full((1,), -1, dtype=torch.int32)
    threshold = ctypes.c_double(float(torch.tensor(0.1)))  # equality reuses, as on the host
    pointers = ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(flag.data_ptr())
    emulated.decide(pointers[0], threshold, pointers[1], ctypes.c_uint64(42))
    assert flag.item() == compute
    assert emulated.last_condition()[:2] == [42, compute]
