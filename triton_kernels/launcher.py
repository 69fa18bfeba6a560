# SPDX-License-Identifier: Apache-2.0
"""Launches that are planned once per layout of their tensors, and then go past Triton's JIT.

The JIT binds, classifies and hashes every argument of every launch, which takes the host longer
than a GPU needs for a small tensor; so does working out grids and strides. A `Plan` holds both
results. It is found by the device, and for each tensor by dtype, shape, strides and its address
modulo 16: integers follow from these, and thereby all that the JIT specialises on (one, multiples
of 16, what is beyond int32, aligned addresses, None, constants). Floats only count by their type.
The first launch of a plan is the JIT's, which says what it compiled.

Where anything asks to see launches, or to change how kernels are compiled, the JIT makes them all:
hooks, knobs that the program has set, another `JITFunction.run`, the interpreter, AMD (whose
kernels also depend on the size of a storage), and a Triton whose own launch does not read as the
one known here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

# The versions whose launch and specialisation were compared with this file, by running them.
VERSIONS = ((3, 5), (3, 9))
# How `JITFunction.run` of these versions launches what it has compiled.
CALL = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    "launch_metadata, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, "
    "*bound_args.values())"
)
# Plans kept per `Launcher`; each new shape is another one.
LIMIT = 4096

_RUN = triton.JITFunction.run
# Lists and dicts that stay empty unless a program watches launches or sets a knob.
_WATCHES = (
    vars(knobs.runtime),
    vars(knobs.compilation),
    type(knobs.runtime).launch_enter_hook.calls,
    type(knobs.runtime).launch_exit_hook.calls,
)


@cache
def knows_this_triton() -> bool:
    """Whether Triton launches a compiled kernel the way a `Launcher` does."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not VERSIONS[0] <= version <= VERSIONS[1]:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(_RUN)))
    except OSError:  # an installation without sources
        return False
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if call.startswith("kernel.run(")] == [CALL]


@dataclass(slots=True)
class Plan:
    """How a kernel runs on tensors of one layout, and what the JIT compiled for it, once it has."""

    programs: int
    # The arguments of the kernel behind those of `Launcher.launch`: what the layout decides.
    numbers: tuple[Any, ...]
    # Of a reduction: results that it computes, and partial sums that it needs room for.
    results: int = 0
    partials: int = 0
    device: int = -1
    compiled: tuple[Any, ...] | None = None


class Launcher:
    """A `triton.jit` function, its options (num_warps and others) and the plans of its launches.

    make: Plan of a launch, from the tensors and options given to `plan`. It may look at their
    dtypes, shapes and strides: with the addresses modulo 16, these are what a plan is found by.
    """

    def __init__(self, kernel: Any, make: Callable[..., Plan], **options: Any) -> None:
        self.kernel = kernel
        self.make = make
        self.options = options
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def plan(self, tensors: Sequence[Tensor | None], *options: Any) -> Plan:
        """The plan of a launch on the device of the first tensor.

        tensors: all that the kernel gets but fresh allocations, whose dtype and alignment never
        change: None stands for one where there is a choice. options: integers and booleans.
        """
        first = cast(Tensor, tensors[0])
        device = first.get_device()
        key: list[Any] = [device if device >= 0 else first.device, *options]
        for t in tensors:
            if t is None:
                key.append(None)
            else:
                key += (
                    t.dtype,
                    t.data_ptr() & 15,
                    t.shape if t.is_contiguous() else (t.shape, t.stride()),
                )
        at = tuple(key)
        found = self._plans.get(at)
        if found is None:
            found = self.make(tensors, *options)
            found.device = device
            if len(self._plans) >= LIMIT:
                self._plans.clear()
            self._plans[at] = found
        return found

    def launch(self, plan: Plan, *args: Any) -> None:
        """Run the kernel as planned. args: its tensors and floats; one may be a tuple of either."""
        compiled, device = plan.compiled, plan.device
        watched = any(_WATCHES) or self.kernel.pre_run_hooks or triton.JITFunction.run is not _RUN
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(plan, *args)
        elif compiled is None or watched:
            found = self.kernel[(plan.programs,)](*args, *plan.numbers, **self.options)
            if not watched and _reusable(found):
                # and the kernel itself: with its last reference goes the module of its function
                plan.compiled = found.run, found.function, found.packed_metadata, found
        else:
            run, function, metadata, _ = compiled
            stream = driver.active.get_current_stream(device)
            hooks = (None, None, None)
            run(plan.programs, 1, 1, stream, function, metadata, *hooks, *args, *plan.numbers)


def _reusable(compiled: Any) -> bool:
    """Whether a later launch may do without the JIT; the interpreter compiles nothing."""
    if not isinstance(compiled, triton.compiler.CompiledKernel):
        return False
    return compiled.metadata.target.backend == "cuda" and knows_this_triton()
