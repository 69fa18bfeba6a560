# SPDX-License-Identifier: Apache-2.0
"""Which counters a launch gets: on streams, under capture, without a device that owns any."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import stubbed_gpu
import torch
from torch import Tensor

pytest.importorskip("triton")


@dataclass
class Gpu:
    """What `counters` asks of a tensor and of CUDA."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    is_cuda: bool = True
    stream: int = 0
    capturing: bool = False
    loaded: int = 0
    own: int = 0

    def new_zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        self.own += 1
        return torch.zeros(count, dtype=dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    from fastcache.triton_kernels import counters as module

    gpu = Gpu()

    def load(device: torch.device) -> Tensor:
        assert not gpu.capturing, "a module is loaded during a capture"
        gpu.loaded += 1
        return torch.zeros(4 * module.RESULTS, dtype=torch.int32)

    active = SimpleNamespace(get_current_stream=lambda device: gpu.stream)
    monkeypatch.setattr(module, "_pools", {})
    monkeypatch.setattr(module, "_memory", load)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    return gpu


def words(t: Tensor) -> set[int]:
    """The addresses of its elements."""
    return {t.data_ptr() + 4 * i for i in range(t.numel())}


def test_a_stream_keeps_its_counters_and_shares_them_with_no_other(gpu: Gpu) -> None:
    from fastcache.triton_kernels.counters import RESULTS, counters

    first = counters(gpu, RESULTS)
    assert counters(gpu, 1).data_ptr() == first.data_ptr()
    gpu.stream = 7
    other = counters(gpu, 1)
    assert not words(first) & words(other)
    gpu.stream = 0
    assert counters(gpu, 3).data_ptr() == first.data_ptr()
    assert (gpu.loaded, gpu.own) == (1, 0)


def test_every_captured_launch_has_counters_of_its_own(gpu: Gpu) -> None:
    from fastcache.triton_kernels.counters import counters

    seen = words(counters(gpu, 1))
    gpu.capturing = True
    for count in (1, 2, 5, 1):
        taken = counters(gpu, count)
        assert taken.numel() >= count and taken.data_ptr() % 16 == 0
        assert not words(taken) & seen
        seen |= words(taken)
    assert (gpu.loaded, gpu.own) == (1, 0)


def test_a_capture_before_any_launch_gets_zeros_of_its_own(gpu: Gpu) -> None:
    from fastcache.triton_kernels.counters import counters

    gpu.capturing = True
    assert counters(gpu, 2).tolist() == [0, 0]
    assert (gpu.loaded, gpu.own) == (0, 1)


def test_a_launch_that_the_memory_has_no_room_for_gets_zeros_of_its_own(gpu: Gpu) -> None:
    from fastcache.triton_kernels.counters import RESULTS, counters

    assert counters(gpu, RESULTS + 1).tolist() == [0] * (RESULTS + 1)
    gpu.capturing = True
    taken = [counters(gpu, RESULTS) for _ in range(6)]
    assert gpu.own == 1 + 2 and len(set.union(*map(words, taken))) == 6 * RESULTS
    gpu.capturing, gpu.stream = False, 9
    counters(gpu, 1)
    assert gpu.own == 4


def global_variable() -> dict[str, object]:
    """In a child that finds the stub: where the module's counters lie, and what torch is told."""
    from fastcache.triton_kernels import counters

    library = stubbed_gpu.install()
    library.stub_counters.restype = library.stub_counters_bytes.restype = ctypes.c_uint64
    torch.version.cuda = "13.0"
    told = counters._Global(0).__cuda_array_interface__
    return {
        "told": [*told["shape"], told["typestr"], *told["data"]],
        "true": [library.stub_counters_bytes() // 4, "<i4", library.stub_counters(), False],
    }


@pytest.mark.skipif(bool(stubbed_gpu.missing()), reason=stubbed_gpu.missing())
def test_counters_lie_in_a_global_variable_of_a_module(tmp_path: Path) -> None:
    env = stubbed_gpu.environment(tmp_path)
    child = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(child, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["told"] == found["true"]


@pytest.mark.skipif(bool(stubbed_gpu.missing()), reason=stubbed_gpu.missing())
def test_the_module_assembles(tmp_path: Path) -> None:
    from fastcache.triton_kernels import counters, machine_code

    source, binary = tmp_path / "module.ptx", tmp_path / "module.cubin"
    source.write_bytes(counters.MODULE)
    for arch in ("sm_80", "sm_90"):
        subprocess.run(
            [machine_code.TOOLS / "ptxas", f"-arch={arch}", source, "-o", binary], check=True
        )
    command = [machine_code.TOOLS / "cuobjdump", "--dump-resource-usage", binary]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"GLOBAL:{4 * counters.COUNTERS}" in usage


if __name__ == "__main__":
    import ctypes

    print(json.dumps(global_variable()))
