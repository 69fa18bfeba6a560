# SPDX-License-Identifier: Apache-2.0
"""Launches without the JIT are those of the JIT, in at most half its time; on a stub of libcuda.

Started as a script with the name of a function below, this file is the child process in which
Triton finds the stub; it answers in JSON.
"""

from __future__ import annotations

import json
import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import stubbed_gpu
import torch
from torch import Tensor

FP32, FP16, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn

# --- in the child ------------------------------------------------------------------------------


@cache
def reserved() -> Tensor:
    """64 GB of addresses that nothing backs: on a stub no kernel reads or writes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # not to be reserved, on Linux
    return torch.frombuffer(mmap.mmap(-1, 1 << 36, flags=flags), dtype=torch.uint8)


def tensors(*shape: int, dtype: torch.dtype = BF16, count: int = 4, offset: int = 0) -> list:
    """Tensors that may be larger than the memory is, `offset` elements past an aligned address."""
    n = torch.Size(shape).numel()
    flat = reserved()[: (n + 16) * dtype.itemsize].view(dtype)
    return [flat[offset : offset + n].view(shape) for _ in range(count)]


def every_op(y: Tensor, x: Tensor, prev: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    """A call of every launcher on these tensors of [B, T, C], and of each with an option."""
    from fastcache import triton_kernels as kernels

    q = reserved().view(E4M3).as_strided(y.shape, y.stride())
    scale = reserved()[: 4 * y.shape[:-1].numel()].view(FP32).view(y.shape[:-1])
    prior, weights, sums, one, three = (torch.empty(n) for n in (2, 5, 2, 1, 3))
    six, ten = (torch.empty(1, n, dtype=torch.float64) for n in (6, 10))
    each = torch.empty(y.shape[0], 2)
    return {
        "l1": lambda: kernels.residual_l1(y, x, prev),
        "l1 + store": lambda: kernels.residual_l1(y, x, prev, out),
        "l1 per sample": lambda: kernels.residual_l1(y, x, prev, out, True),
        "l1 into sums": lambda: kernels.residual_l1(y, x, prev, out, sums=sums),
        "magnitude": lambda: kernels.residual_magnitude(y, x, prev),
        "magnitude + store": lambda: kernels.residual_magnitude(y, x, prev, out, 1e-3, True),
        "modulated": lambda: kernels.modulated_l1(y, y[:1, :1], y[:1, :1], prev),
        "modulated + store": lambda: kernels.modulated_l1(y, x, x, prev, out),
        "store": lambda: kernels.residual_store(out, y, x),
        "apply": lambda: kernels.residual_apply(out, y, x),
        "combine": lambda: kernels.linear_combine(out, [y, x, prev], [0.5, 1, -1.0]),
        "combine device": lambda: kernels.linear_combine(out, [y, x], weights[:2]),
        "combine device, unaligned": lambda: kernels.linear_combine(out, [y, x], weights[1:3]),
        "combine samples": lambda: kernels.combine_samples(out, [y, x], each),
        "taylor": lambda: kernels.taylor_update([y, x, prev], out, 0.5, 3),
        "taylor, first": lambda: kernels.taylor_update([y, x, prev], out, 0.5, 1),
        "quantize": lambda: kernels.quantize_store(q, scale, y, x),
        "quantize y": lambda: kernels.quantize_store(q, scale, y),
        "quantized combine": lambda: kernels.quantized_combine(out, y, [q], [scale], [0.5]),
        "quantized sum": lambda: kernels.quantized_combine(out, None, [q] * 2, [scale] * 2, [1, 2]),
        "guided sums": lambda: kernels.guided_sums(y, [x, prev, out]),
        "guided sums 1": lambda: kernels.guided_sums(y, [x, prev], True),
        "guided solve": lambda: kernels.guided_solve(
            torch.empty(y.shape[0], 6, dtype=torch.float64), prior, 0.003, True
        ),
        "guided check": lambda: kernels.guided_check(ten, [six] * 2, three, prior, 0.003),
        "exponential": lambda: kernels.exponential_solve([six] * 2, one, 0.003),
    }


BIG = 2**31 // 4096
SAMPLES: dict[str, Callable[[], list[Tensor]]] = {
    "dense": lambda: tensors(2, 64, 320),
    "fp32": lambda: tensors(2, 64, 320, dtype=FP32),
    "one element": lambda: tensors(1, 1, 1),
    "odd": lambda: tensors(3, 41, 101),
    "unaligned": lambda: tensors(2, 64, 320, offset=1),
    "one of them unaligned": lambda: tensors(2, 64, 320, count=3) + tensors(2, 64, 320, offset=4),
    "a stored tensor of another dtype": lambda: (
        tensors(2, 64, 320, dtype=FP32, count=2) + tensors(2, 64, 320, count=2)
    ),
    "token range": lambda: [t[:, 3:40] for t in tensors(2, 64, 320)],
    "token range, odd": lambda: [t[:, 1:] for t in tensors(3, 5, 33)],
    "a batch stride of one": lambda: [
        t.as_strided((3, 1, 1), (1, 1, 1)) for t in tensors(1, 64, 320)
    ],
    "just below 2**31": lambda: tensors(1, BIG - 1, 4096),
    "2**31": lambda: tensors(1, BIG, 4096),
    "beyond 2**31": lambda: tensors(3, BIG + 1, 4096),
    "a batch stride beyond 2**31": lambda: [t[:, 5:] for t in tensors(2, BIG + 3, 4096)],
}


def same_launches() -> dict[str, str]:
    """What differs between a launch of the JIT and the two after it, by op and tensors."""
    from fastcache.triton_kernels import launcher

    stubbed_gpu.install()
    import triton

    launched: list[tuple] = []
    init = triton.compiler.CompiledKernel._init_handles

    def watched(self: Any) -> None:
        init(self)
        if not hasattr(self._run, "inner"):
            inner = self._run

            def record(*args: Any) -> None:
                grid, stream, function, metadata, hooked = args[:3], *args[3:6], args[9:]
                launched.append((self.hash, grid, stream, function, metadata, described(hooked)))
                inner(*args)

            record.inner = inner
            self._run = record

    triton.compiler.CompiledKernel._init_handles = watched
    direct, found, kernels = launcher._WATCHES, {}, set()
    for sample, make in SAMPLES.items():
        for op, call in every_op(*make()[:4]).items():
            launched.clear()
            launcher._WATCHES = ([True],)  # the JIT launches
            call()
            launcher._WATCHES = direct
            call(), call()
            each = len(launched) // 3
            jit = launched[:each]
            if not each or jit * 3 != launched:
                found[f"{op}, {sample}"] = "\n".join(map(str, launched))
            kernels.update(kernel for kernel, *_ in jit)
    found["kernels"] = str(len(kernels))
    return found


def described(args: tuple) -> list:
    """Arguments that compare: fresh results live elsewhere on every call."""
    return [
        (a.dtype, a.data_ptr() % 16, a.shape)
        if isinstance(a, Tensor)
        else described(a)
        if isinstance(a, tuple)
        else a
        for a in args
    ]


def launches_per_op() -> dict[str, int]:
    """Launches of a call of each op, after a first one."""
    library, counts = stubbed_gpu.install(), {}
    for op, call in every_op(*tensors(2, 64, 320)).items():
        call()
        before = library.stub_launches()
        call()
        counts[op] = library.stub_launches() - before
    return counts


def host_time() -> dict[str, list[float]]:
    """Median host seconds of a call planned and launched by the JIT, and of ours, in turns."""
    from fastcache.triton_kernels.launcher import Launcher

    stubbed_gpu.install()
    torch.set_num_threads(1)
    a, b, c = (torch.empty(8) for _ in range(3))
    calls = every_op(*tensors(1, 64, 3072)) | {"add": lambda: torch.add(a, b, out=c)}

    def by_jit(self: Any, plan: Any, *args: Any) -> None:
        self.kernel[(plan.programs,)](*args, *plan.numbers, **self.options)

    plain = {"plan": lambda self, t, *options: self.make(t, *options), "launch": by_jit}
    ours = {name: getattr(Launcher, name) for name in plain}

    def seconds(methods: dict[str, Any], call: Callable[[], object]) -> float:
        for name, method in methods.items():
            setattr(Launcher, name, method)
        call()
        start = time.thread_time()
        for _ in range(40):
            call()
        return (time.thread_time() - start) / 40

    times = {}
    for op, call in calls.items():
        pairs = [[seconds(plain, call), seconds(ours, call)] for _ in range(25)]
        times[op] = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return times


def falls_back() -> dict[str, Any]:
    """How often the JIT launched: directly, under each thing that it must not miss, and again."""
    from fastcache.triton_kernels import launcher
    from fastcache.triton_kernels.linear_combine import _launcher, residual_store

    library = stubbed_gpu.install()
    import triton
    from triton import knobs

    y, x, out, _ = tensors(2, 64, 320)
    run, by_jit, seen = triton.JITFunction.run, 0, []
    assert launcher.knows_this_triton()

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal by_jit
        by_jit += 1
        return run(self, *args, **kwargs)

    triton.JITFunction.run = launcher._RUN = count  # as if it were Triton's own
    found: dict[str, Any] = {}

    def jit_launches(name: str) -> None:
        nonlocal by_jit
        residual_store(out, y, x)
        by_jit, before = 0, library.stub_launches()
        for _ in range(3):
            residual_store(out, y, x)
        assert library.stub_launches() - before == 3
        found[name] = by_jit

    jit_launches("directly")
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        seen.clear()
        getattr(knobs.runtime, hook).add(seen.append)
        jit_launches(hook)
        getattr(knobs.runtime, hook).remove(seen.append)
        found[f"{hook} saw"] = len(seen)
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        jit_launches("debug")
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        jit_launches("a knob of the compiler")
    _launcher.kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
    jit_launches("a hook of the kernel")
    _launcher.kernel.pre_run_hooks.clear()
    launcher._RUN = run
    jit_launches("another run")
    launcher._RUN = count
    jit_launches("directly again")
    for version, known in (("3.4.9", False), ("3.5.0", True), ("3.9.1", True), ("3.10.0", False)):
        launcher.knows_this_triton.cache_clear()
        triton.__version__, launcher._RUN = version, run
        found[version] = launcher.knows_this_triton() is known
    triton.__version__ = "3.6.0+git1234"
    launcher.knows_this_triton.cache_clear()
    launcher.CALL = launcher.CALL.replace("launch_metadata, ", "")
    found["another launch"] = not launcher.knows_this_triton()
    _launcher._plans.clear()
    launcher._RUN = count
    jit_launches("unknown")
    found["remembered"] = sum(p.compiled is not None for p in _launcher._plans.values())
    return found


def outlives_the_jit() -> bool:
    """Whether a planned kernel is still there when the JIT has forgotten it."""
    import gc
    import weakref

    from fastcache.triton_kernels.linear_combine import _launcher, residual_store

    stubbed_gpu.install()
    t = torch.empty(64)
    residual_store(t, t, t)
    (kernel,) = _launcher.kernel.device_caches[0][0].values()
    held = weakref.ref(kernel)
    _launcher.kernel.device_caches.clear()
    del kernel
    gc.collect()
    return held() is not None


def forgets() -> list[int]:
    """Kernels remembered as shapes keep changing."""
    from fastcache.triton_kernels import launcher
    from fastcache.triton_kernels.linear_combine import _launcher, residual_store

    library, launcher.LIMIT, sizes = stubbed_gpu.install(), 3, []
    for n in range(16, 160, 16):
        t = torch.empty(n)
        residual_store(t, t, t)
        sizes.append(len(_launcher._plans))
    assert library.stub_launches() == len(sizes)
    return sizes


# --- the tests ---------------------------------------------------------------------------------

pytestmark = pytest.mark.skipif(bool(stubbed_gpu.missing()), reason=stubbed_gpu.missing())


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Call a function of this file in a process that finds the stub."""
    env = stubbed_gpu.environment(tmp_path_factory.mktemp("stub"))

    def answer(name: str) -> Any:
        command = [sys.executable, "-W", "ignore", __file__, name]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return answer


@pytest.mark.slow
def test_a_launch_without_the_jit_is_that_of_the_jit(child: Callable) -> None:
    found = child("same_launches")
    assert int(found.pop("kernels")) > 100
    assert not found, "\n".join(f"{name}: {text}" for name, text in found.items())


def test_the_number_of_launches_of_every_op(child: Callable) -> None:
    counts = child("launches_per_op")
    assert counts == dict.fromkeys(counts, 1)


# Of the time of the JIT; these allocate results for a launch of few arguments.
MOST = {"guided solve": 0.65, "guided check": 0.75, "exponential": 0.75}


def test_the_host_spends_at_most_half_the_time_of_the_jit(child: Callable) -> None:
    times = child("host_time")
    add, _ = times.pop("add")
    ratios = {op: ours / jit for op, (jit, ours) in times.items()}
    print(
        {op: f"{ours / add:.1f} of {jit / add:.1f} torch.add" for op, (jit, ours) in times.items()}
    )
    assert {op: r for op, r in ratios.items() if r > MOST.get(op, 0.5)} == {}


def test_whoever_watches_launches_or_sets_a_knob_gets_the_jit(child: Callable) -> None:
    found = child("falls_back")
    direct = {name: found.pop(name) for name in ("directly", "directly again", "remembered")}
    assert set(direct.values()) == {0}
    watched = {name: value for name, value in found.items() if not isinstance(value, bool)}
    assert watched == {name: 3 + name.endswith("saw") for name in watched}
    assert len(watched) == 9 and all(found.values())


def test_a_planned_kernel_outlives_the_caches_of_the_jit(child: Callable) -> None:
    """Triton unloads the module of a kernel that nothing refers to."""
    assert child("outlives_the_jit") is True


def test_new_shapes_do_not_fill_the_memory(child: Callable) -> None:
    assert child("forgets") == [1, 2, 3] * 3


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
