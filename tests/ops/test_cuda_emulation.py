# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels run on the host, in an emulation that a GPU could not be told from by results.

`csrc/cuda/emulation.h` says what it checks: blocks run in random order, launches of several streams
mix, and what a block writes for others is seen only behind a fence. Faults put into the kernels must
fail here. The whole file runs once more under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcache.ops import reference

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
CXX = shutil.which("c++")
SANITIZED = "FASTCACHE_SANITIZED"
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(
    CXX is None or not SOURCES, reason="needs a C++ compiler and sources"
)

# --- the kernels as host code ------------------------------------------------------------------

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


ENTRY = """
using namespace fastcache;
using cuda::Terms;
void check(const char* error) { if (error) throw error; }
extern "C" {
void l1(int t, Shape s, Operand y, Operand x, Operand p, Operand o, bool each, float* to,
        double* scratch, void* stream) {
  check(cuda::residual_l1(Type(t), s, y, x, p, o, each, to, scratch, stream));
}
void magnitude(int t, Shape s, Operand y, Operand x, Operand p, Operand o, double eps, bool each,
               float* to, double* scratch, void* stream) {
  check(cuda::residual_magnitude(Type(t), s, y, x, p, o, eps, each, to, scratch, stream));
}
void combine(int t, Shape s, Operand o, const Terms* terms) {
  check(cuda::linear_combine(Type(t), s, o, *terms, nullptr));
}
int64_t scratch(int64_t samples) { return cuda::scratch_of(samples); }
void seed(unsigned value) { emulation::dice.seed(value); }
void hold() { emulation::held = true; }
void let_go() { emulation::held = false, emulation::run_all(); }
void capture(void* stream, bool on) { emulation::capturing[stream] = on; }
// what waits on a stream runs on another one, as a graph does
void move(void* from, void* to) {
  emulation::streams[to] = emulation::streams[from];
  emulation::streams.erase(from);
}
bool counters_are_zero() {
  for (unsigned counter : cuda::counters) if (counter) return false;
  return true;
}
}
"""


def build(folder: Path, fault: tuple[str, str] = ("", "")) -> ctypes.CDLL:
    """The kernels behind C functions; the fault replaces a text in them."""
    for name in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).touch()
    found = 0

    def read(source: Path) -> str:
        nonlocal found
        text = source.read_text().replace('"../', f'"{CUDA.parent}/')
        found += fault[0] in text
        return text.replace(*fault) if fault[0] else text

    for header in CUDA.glob("*.*h"):
        (folder / header.name).write_text(read(header))
    text = '#include "emulation.h"\n'
    for source in SOURCES:
        # kernel<<<grid, threads, 0, stream>>>(..) -> emulation::launch(kernel, grid, threads, stream)(..)
        launch = re.sub(
            r"(\w+)<<<(\w+), (\w+), 0, (.*?)>>>\(",
            r"emulation::launch(\1, \2, \3, \4)(",
            read(source),
        )
        # each file has its own anonymous names
        names = ("kernel", "add", "Pack")
        text += "".join(f"#define {name} {name}_{source.stem}\n" for name in names)
        text += launch + "".join(f"#undef {name}\n" for name in names)
    assert found, f"the sources no longer contain {fault[0]!r}"
    (folder / "all.cpp").write_text(text + ENTRY)
    library = folder / "all.so"
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off", f"-I{folder}"]
    flags += SANITIZE if os.environ.get(SANITIZED) else []
    command = [CXX, *flags, folder / "all.cpp", "-o", library]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.scratch.restype = ctypes.c_int64
    loaded.counters_are_zero.restype = ctypes.c_bool
    for name in ("capture", "move"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p] * 2
    return loaded


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"))


# --- calls -------------------------------------------------------------------------------------


def operand(t: Tensor | None) -> Operand:
    return (
        Operand(t.data_ptr(), TYPES[t.dtype], t.stride(0)) if t is not None else Operand(None, 0, 0)
    )


def shape(t: Tensor) -> Shape:
    return Shape(t.shape[0], t[0].numel(), t.shape[-1])


class Metric:
    """A launch of a metric: its result, and all memory that must live until it has run."""

    def __init__(
        self,
        kernels: ctypes.CDLL,
        name: str,
        tensors: Sequence[Tensor],
        out: Tensor | None = None,
        per_sample: bool = False,
        stream: int = 0,
    ) -> None:
        y = tensors[0]
        self.name, self.tensors, self.per_sample = name, tensors, per_sample
        self.got = torch.full((y.shape[0] if per_sample else 1, 2 - (name != "l1")), torch.nan)
        self.scratch = torch.full((kernels.scratch(y.shape[0]),), torch.nan, dtype=torch.float64)
        eps = [ctypes.c_double(1e-8)] if name == "magnitude" else []
        getattr(kernels, name)(
            TYPES[y.dtype],
            shape(y),
            *map(operand, (*tensors, out)),
            *eps,
            per_sample,
            ctypes.c_void_p(self.got.data_ptr()),
            ctypes.c_void_p(self.scratch.data_ptr()),
            ctypes.c_void_p(stream),
        )

    def check(self) -> None:
        op = reference.residual_l1 if self.name == "l1" else reference.residual_magnitude
        want = op(*self.tensors, per_sample=self.per_sample).reshape(self.got.shape)
        torch.testing.assert_close(self.got, want, rtol=2e-6, atol=0)


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


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_metrics_match_the_reference_and_leave_the_counter_at_zero(emulated, dtype, layout):
    size, align, gap = layout
    y, x, prev, out = (rows(size, dtype, i, align, gap) for i in range(4))
    expected = torch.empty_like(out)
    reference.residual_store(expected, y, x)
    for per_sample in (False, True):
        out.fill_(torch.nan)
        Metric(emulated, "l1", (y, x, prev), out, per_sample).check()
        assert torch.equal(out, expected) and emulated.counters_are_zero()
        Metric(emulated, "magnitude", (y, x, prev), None, per_sample).check()
        assert emulated.counters_are_zero()
    around = out.as_strided((size[0] * (size[1] * size[2] + gap),), (1,))
    assert (around == 77.0).sum() == size[0] * gap  # nothing was written between the samples


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_weighted_sums_have_the_bits_of_the_reference(emulated, dtype, layout, count):
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


# --- order and overlap -------------------------------------------------------------------------


def several(seed: int = 0, size: tuple[int, int, int] = (2, 13, 512)) -> list[Tensor]:
    return [rows(size, torch.float32, seed + i, True) for i in range(3)]


def any_order(kernels: ctypes.CDLL) -> None:
    """Blocks run in any order: the bits are the same."""
    for name in ("l1", "magnitude"):
        results = []
        for seed in range(8):
            kernels.seed(seed)
            results.append(Metric(kernels, name, several()))
            results[-1].check()
        assert all(torch.equal(r.got, results[0].got) for r in results)
    assert kernels.counters_are_zero()


def mixed_streams(kernels: ctypes.CDLL) -> None:
    """Launches of three streams mix, two of each behind each other."""
    for seed in range(4):
        kernels.seed(seed)
        kernels.hold()
        launches = [
            Metric(kernels, name, several(10 * stream + i), None, bool(i), stream)
            for i in range(2)
            for stream in (1, 2, 3)
            for name in ("l1", "magnitude")
        ]
        kernels.let_go()
        for launch in launches:
            launch.check()
        assert kernels.counters_are_zero()


def replayed_graphs(kernels: ctypes.CDLL) -> None:
    """Captured launches run on other streams, beside each other and beside their own stream."""
    for seed in range(4):
        kernels.seed(seed)
        kernels.hold()
        launches = []
        for graph in (7, 8):
            kernels.capture(1, True)
            launches.append(Metric(kernels, "l1", several(graph), stream=1))
            kernels.move(1, graph)
            kernels.capture(1, False)
        launches.append(Metric(kernels, "l1", several(3), stream=1))
        kernels.let_go()
        for launch in launches:
            launch.check()
        assert kernels.counters_are_zero()


OVERLAPS: list[Callable[[ctypes.CDLL], None]] = [any_order, mixed_streams, replayed_graphs]


@pytest.mark.parametrize("overlap", OVERLAPS, ids=lambda f: f.__name__)
def test_order_and_overlap_do_not_matter(emulated, overlap):
    overlap(emulated)


COUNTERS = ("COUNTERS = 65536", "COUNTERS = 2")


def test_launches_for_which_no_counter_is_left_bring_their_own(tmp_path):
    kernels = build(tmp_path, COUNTERS)
    for overlap in OVERLAPS:
        overlap(kernels)


FAULTS = {
    "a block counts itself before its partial sums are visible": (
        "    __threadfence();\n    const",
        "    const",
        any_order,
    ),
    "the counter is not set back": ("blocks - 1) == blocks - 1", "~0u) == blocks - 1", any_order),
    "an earlier block adds up": ("== blocks - 1;", "== 0;", any_order),
    "streams share a counter": ("try_emplace(stream,", "try_emplace(nullptr,", mixed_streams),
    "a captured launch takes the counter of its stream": (
        "status != cudaStreamCaptureStatusNone",
        "false",
        replayed_graphs,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_fails(tmp_path, name):
    good, bad, overlap = FAULTS[name]
    kernels = build(tmp_path, (good, bad))
    with pytest.raises(AssertionError):
        overlap(kernels)


# --- sanitizers --------------------------------------------------------------------------------


def sanitizer() -> str:
    """The address sanitizer's library, which must be loaded first; empty where there is none."""
    command = [CXX or "c++", "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip() if CXX else ""
    return path if os.path.isabs(path) else ""


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        SANITIZED: "1",
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


needs_sanitizers = pytest.mark.skipif(
    not sanitizer() or bool(os.environ.get(SANITIZED)), reason="needs gcc's sanitizers"
)


@pytest.mark.slow
@needs_sanitizers
def test_the_sanitizers_find_nothing():
    chosen = "match_the_reference or bits_of_the_reference or matter"
    done = sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_sanitizers
@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ("if (rest < shape.length)", "if (true)", "AddressSanitizer"),
        ("if (reinterpret_cast<uintptr_t>(a.data) % 16) return false;", "", "misaligned address"),
    ],
)
def test_the_sanitizers_find_a_seeded_fault(tmp_path, good, bad, says):
    done = sanitized(__file__, str(tmp_path), good, bad)
    assert done.returncode != 0 and says in done.stderr, done.stderr[-3000:]


if __name__ == "__main__":
    child = build(Path(sys.argv[1]), (sys.argv[2], sys.argv[3]))
    for align in (True, False):
        Metric(child, "l1", [rows((1, 3, 40), torch.float32, i, align) for i in range(3)])
