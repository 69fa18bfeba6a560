# SPDX-License-Identifier: Apache-2.0
"""What Inductor would run on a GPU that is absent, for the compiled steps of a tiny model. A program of its own.

Steps run on the CPU; every graph that Dynamo hands over is lowered a second time with all its tensors on a fake
CUDA device, as far as the source of its kernels and no further. Prints JSON: per method, what the source of each
program holds.

Usage: python absent_gpu.py FOLDER MODEL METHOD...  (the guard of `absent_gpu.cpp` is built in FOLDER)
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
import torch._inductor.compile_fx as compile_fx
import torch._inductor.graph
from fastcache.triton_kernels.aot import compile_only
from test_captured_reuse import CONFIGS
from test_compile import clock, fresh
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import scheduler
from torch._inductor.fx_passes import joint_graph, post_grad

import fastcache
from fastcache.runtime.patch import ATTACHED

STEPS = 12
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 * 2**20,
    gcnArchName="",
    is_integrated=False,
    is_multi_gpu_board=False,
    uuid="",
)
LAUNCH = re.compile(r"^\s+(triton_\w+?)(?:_\d+)?\.run\(", re.M)
EXTERN = re.compile(
    r"^\s+(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.(?:fastcache|aten)\.\w+)[\w.]*\(", re.M
)
# a kernel that moves values and computes nothing
MOVE = re.compile(
    r"triton_poi_fused(_(_to_copy|_unsafe_view|clone|copy_?|permute|select|slice|split|transpose|unbind"
    r"|unsqueeze|view))+"
)


class Written(BaseException):
    """The source is there, and nothing is to be loaded."""


def build_guard(folder: Path) -> Path:
    """A library with the guard; torch's own CUDA build has one."""
    torch_dir = Path(torch.__file__).parent
    built = folder / "absent_gpu.so"
    command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_dir / 'include'}"]
    source = Path(__file__).with_suffix(".cpp")
    libraries = [f"-L{torch_dir / 'lib'}", "-lc10"]
    subprocess.run([*command, str(source), "-o", str(built), *libraries], check=True)
    return built


class Nothing(contextlib.nullcontext):
    """In place of `torch.cuda.device` and its like."""

    def __init__(self, *args: Any) -> None:
        super().__init__()


def said(value: Any) -> Callable:
    return lambda *args, **kwargs: value


# What torch is made to believe while Inductor works.
PRETENDED: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "is_available": said(True),
        "device_count": said(1),
        "current_device": said(0),
        "get_device_properties": said(H200),
        "get_device_capability": said((9, 0)),
        "synchronize": said(None),
        "_lazy_init": said(None),
        "_exchange_device": said(0),
        "_maybe_exchange_device": said(0),
        "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": said(None),
        "device": Nothing,
        "_DeviceGuard": Nothing,
    },
    CudaInterface: {
        "is_available": staticmethod(said(True)),
        "get_compute_capability": staticmethod(said(90)),
        "get_device_properties": staticmethod(said(H200)),
        "current_device": staticmethod(said(0)),
        "get_raw_stream": staticmethod(said(0)),
        "device": Nothing,
    },
    CudaInterface.Worker: {
        "get_device_properties": staticmethod(said(H200)),
        "current_device": staticmethod(said(0)),
    },
    torch._C: {"_cuda_cudaCachingAllocator_is_enabled": said(True)},
    scheduler: {"has_triton": said(True)},
    # whose patterns are traced with real tensors on the device
    joint_graph: {"lazy_init": said(None)},
    post_grad: {"lazy_init": said(None)},
}


@contextlib.contextmanager
def pretending(more: dict[Any, dict[str, Any]]) -> Iterator[None]:
    """Replaces attributes, and puts them back."""
    with contextlib.ExitStack() as stack:
        for owner, attributes in (*PRETENDED.items(), *more.items()):
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


class Sources:
    """A Dynamo backend that runs graphs as they are and keeps what Inductor makes of them."""

    def __init__(self, label: Callable[[], str]) -> None:
        self.label, self.found = label, {}

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        run = copy.deepcopy(module)  # the one given knows which of its inputs are static
        mode = detect_fake_mode(inputs)
        assert mode is not None
        for part in (m for m in module.modules() if isinstance(m, torch.fx.GraphModule)):
            for node in part.graph.nodes:
                node.args = torch.fx.node.map_aggregate(node.args, _moved)
                node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _moved)
            part.recompile()
        with mode:
            fakes = [_faked(value) for value in inputs]
        self.found[self.label()] = written(module, fakes)
        return run.forward


def _moved(value: Any) -> Any:
    """An argument of a graph's node, devices replaced."""
    is_cpu = value == "cpu" if isinstance(value, str) else value == torch.device("cpu")
    return torch.device("cuda", 0) if isinstance(value, str | torch.device) and is_cpu else value


def _faked(value: Any) -> Any:
    """An input of a graph on the absent device."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")


def written(module: torch.fx.GraphModule, fakes: list) -> dict[str, Any]:
    """What Inductor writes for a graph under CUDA graphs."""
    sources: list[str] = []
    found: dict[str, Any] = {}
    real = compile_fx.fx_codegen_and_compile

    def to_source(graph: Any) -> Any:
        sources.append(graph.codegen()[0].value)
        return types.SimpleNamespace(call=lambda args: None, __file__="", runner=None)

    def codegen(gm: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        code = real(gm, inputs, *args, **kwargs)
        info = code.cudagraph_info
        static, mutated = set(kwargs["static_input_idxs"]), set(code.mutated_input_idxs)
        found.update(
            disabled=code.disabled_cudagraphs_reason or "; ".join(info.cudagraph_fail_reasons),
            mutated=len(mutated),
            loose=sorted(mutated - static),
        )
        raise Written

    inductor = {"triton.cudagraphs": True, "fx_graph_cache": False, "graph_partition": True}
    quick = {"joint_graph_constant_folding": False, "compile_threads": 1}
    ours = {
        torch._inductor.graph.GraphLowering: {"compile_to_module": to_source},
        compile_fx: {"fx_codegen_and_compile": codegen},
    }
    try:
        with torch._inductor.config.patch({**inductor, **quick}), pretending(ours):
            compile_fx.compile_fx(module, fakes)
    except Written:
        return found | summary(sources[-1])
    raise AssertionError("Inductor has written nothing")


def summary(source: str) -> dict[str, Any]:
    """Facts that are read off generated code."""
    kernels, extern = LAUNCH.findall(source), EXTERN.findall(source)
    return {
        "partitions": len(re.findall(r"def partition_\d+", source)),
        "reads": source.count(".item()"),
        "kernels": len(kernels),
        "extern": len(extern),
        "moves": sum(bool(MOVE.fullmatch(name)) for name in kernels),
        "names": sorted(kernels) + sorted(extern),
    }


def drive(name: str, inputs: dict, call: Callable, cache: fastcache.Cache | None) -> None:
    for step in tiny.trajectory(name, inputs, STEPS if cache else 1):
        clock["t"] = float(step["timestep"].reshape(-1)[0])
        context = cache.context("cond") if cache else contextlib.nullcontext()
        with context, torch.no_grad():
            call(**step, return_dict=False)


def programs(name: str, method: str) -> dict[str, dict[str, Any]]:
    """The programs of one method on one model, by phase and actions."""
    fresh()
    model, inputs = tiny.build(name, depth=2)
    if method == "uncached":
        sources = Sources(lambda: "uncached")
        drive(name, inputs, torch.compile(model, backend=sources, fullgraph=True), None)
        return sources.found
    on_device = method == "on_device"
    config = CONFIGS["first_block" if on_device else method](name)
    with fastcache.enable(model, config) as cache:
        control = model.__dict__[ATTACHED].control
        sources = Sources(lambda: f"{control.phase} {'/'.join(control.actions)}")
        compiled = fastcache.compile(model, backend=sources, on_device=on_device)
        drive(name, inputs, compiled, cache)
    return sources.found


if __name__ == "__main__":
    folder, model_name, *methods = sys.argv[1:]
    if torch.version.cuda is None:
        torch.ops.load_library(str(build_guard(Path(folder))))
    torch.set_num_threads(1)
    with compile_only(90):  # for Triton's driver
        print(json.dumps({method: programs(model_name, method) for method in methods}))
