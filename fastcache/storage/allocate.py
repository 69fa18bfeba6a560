"""Memory for cached tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


class NoRoom(RuntimeError):
    """There was no memory for a cached tensor."""


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed tensor that may be written in place in any mode and whose address compiled code may keep.

    Raises NoRoom where the memory for it is not there.
    """
    try:
        with torch.inference_mode(False):
            return static(torch.zeros(shape, dtype=dtype, device=device))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise NoRoom(f"no memory for a cached tensor of {tuple(shape)}: {error}") from error
        raise


def static(t: Tensor) -> Tensor:
    """The same tensor; compiled code is told, where there may be any, that its address does not change."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.mark_static_address(t, guard=False)
    return t
