# SPDX-License-Identifier: Apache-2.0
"""A stage of the run on a GPU as it goes there, on a machine without one.

    python pretend_cuda.py STAGE FILE

Tensors asked for on "cuda" live on the host, models are tiny, events and graphs are stand-ins: what is
found is every name, argument and column that is wrong on the way that a dry run does not take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def on_host(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if value is torch.bfloat16:  # hosts take their time over it
        return torch.float32
    return "cpu" if isinstance(value, str) and value == "cuda" else value


class OnHost(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        args, kwargs = tree_map(on_host, (args, kwargs or {}))
        return func(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    def replay(self) -> None:
        time.sleep(1e-5)


def wait(mode: str) -> None:
    """One read of the device in every step."""
    if mode == "warn":
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


MODELS = ("FluxTransformer2DModel", "WanTransformer3DModel", "HunyuanVideoTransformer3DModel")
MODELS += ("SkyReelsV2Transformer3DModel",)
STREAM = SimpleNamespace(wait_stream=lambda other: None, query=lambda: False)
CUDA = {
    "Event": Event,
    "Stream": lambda: STREAM,
    "CUDAGraph": Graph,
    "stream": lambda stream: contextlib.nullcontext(),
    "graph": lambda graph: contextlib.nullcontext(),
    "current_stream": lambda: STREAM,
    "synchronize": lambda: None,
    "_sleep": lambda cycles: None,
    "memory_allocated": lambda: 0,
    "max_memory_allocated": lambda: 0,
    "reset_peak_memory_stats": lambda: None,
    "set_sync_debug_mode": wait,
    "get_device_name": lambda: "Pretended GPU",
    "get_device_properties": lambda index: SimpleNamespace(
        L2_cache_size=10**5, multi_processor_count=132, total_memory=10**9, major=9, minor=0
    ),
}


def shrink() -> None:
    """Models, shapes and buffers of a size that a host can take, and nothing that is compiled."""
    from bench import models
    from bench.gpu import ceilings, correctness, flux, kernels, programs, regional, session, tests

    for name, make in list(models.MODELS.items()):
        if isinstance(make, models.Random) and name.startswith("flux"):
            models.MODELS[name] = dataclasses.replace(make, fields={**make.fields, **flux.TINY})
    flux.TOKENS = programs.TOKENS = 16
    flux.STEPS = 7
    session.COPY = 10**6
    for module in (correctness, kernels):
        module.SHAPES = {"FLUX": (96, 256)}
        module.LARGE = {"Wan": (64, 256)}
        module.kernels_of = lambda device: ["cpp"]
    kernels.COMPILED = ()
    regional.backend = lambda session: "eager"
    matmul = ceilings.matmul
    ceilings.matmul = lambda device, n: matmul(device, 64)
    tests.run = lambda session, files: session.row("tests", files=files)


def main(stage: str, path: str) -> int:
    from bench.gpu.stage import main as run

    shrink()
    for kind in MODELS:  # lazily imported, and what is imported looks at torch
        getattr(diffusers, kind)
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator
    torch.set_default_dtype = lambda dtype: None
    with OnHost():
        return run([stage, path, "cuda", "600"])


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
