# SPDX-License-Identifier: Apache-2.0
"""One library for all ops: what each is called, computes and returns. The only file that touches torch.library.

Schemas put the mutated argument first, end in `_` when they mutate and then return nothing or a fresh
tensor. An op is one family file: schema, body, fake and checked wrapper. Runtime code calls the registered
ops themselves: its tensors are known to fit, and a stored tensor may there have a lower precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.nn import Parameter

from .short import SHORT

lib = Library("fastcache", "DEF")
BODIES: dict[str, Callable[..., Any]] = {}


def define(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op.

    schema: with its name in front. body: Python that asks the dispatch table for a kernel. fake: the shapes it
    returns, and nothing else.
    """
    name = schema.partition("(")[0]
    lib.define(schema)
    lib.impl(name, body, "CompositeExplicitAutograd")
    register_fake(f"fastcache::{name}", fake, lib=lib)
    BODIES[name] = body


def direct(name: str) -> Callable[..., Any]:
    """An op as the runtime calls it: where nothing traces or watches, past torch's dispatcher.

    Going through it to Python and back takes longer than the kernel of a small tensor.

    Args:
        name: of the op, as `torch.ops.fastcache` has it.
    Returns:
        A function with the op's arguments.
    """
    op, body = getattr(torch.ops.fastcache, name).default, BODIES[name]
    # looked up once: each op of an eager step asks
    traced, modes = torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack

    def call(*args: Any) -> Any:
        # export traces under a dispatch mode, so asking for Dynamo is enough
        if traced() or modes():
            return op(*args)
        first = args[0]
        if type(first) is Tensor:
            return body(*args)
        plain = type(first if isinstance(first, Tensor) else first[0]) in (Tensor, Parameter)
        return body(*args) if plain else op(*args)

    return SHORT[name](call) if name in SHORT else call


def same_shapes(name: str, first: Tensor, *others: Tensor) -> None:
    for t in others:
        torch._check(
            t.shape == first.shape,
            lambda t=t: f"{name}: {tuple(t.shape)} and {tuple(first.shape)} differ",
        )
