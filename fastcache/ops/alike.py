# SPDX-License-Identifier: Apache-2.0
"""Whether tensors are as others were, told in one call: a step compares many, and each fact of each costs a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

TensorGuards: Any
try:  # what compiled code asks about its arguments
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # another torch: nothing is told at once
    TensorGuards = None

Alike = Callable[..., bool]


def never(*values: Any) -> bool:
    """Where nothing is known yet, or can be told at once."""
    return False


def alike(*tensors: Tensor, strides: bool = False) -> Alike:
    """What tells of as many values whether they surely are tensors as these are.

    True means of the same class, shape, dtype and device, with the same need of a gradient, and under no dispatch mode
    that was not there; False says nothing. It keeps none of the tensors, takes no tensor twice, and raises TypeError
    for another number of values. Not for traced code.

    strides: they lie in memory as these do, too.
    """
    if TensorGuards is None:
        return never
    sizes = [list(t.shape) for t in tensors]
    steps = [list(t.stride()) if strides else [None] * t.dim() for t in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=steps)
    check: Alike = guards.check
    return check
