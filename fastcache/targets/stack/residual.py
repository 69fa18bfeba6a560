"""The residual of a segment."""

from __future__ import annotations

import torch
from torch import Tensor


def turns(entered: torch.Size, left: torch.Size) -> bool:
    """Whether [batch x frames, tokens, C] went in and [batch x tokens, frames, C] came out."""
    return (
        len(entered) == len(left) == 3
        and entered[2] == left[2]
        and entered[0] * entered[1] == left[0] * left[1]
        and entered[0] % left[1] == 0
    )


def turned(x: Tensor, shape: torch.Size) -> Tensor:
    """[batch x frames, tokens, C] in the layout `shape` of blocks that attend over frames."""
    return x.unflatten(0, (-1, shape[1])).transpose(1, 2).reshape(shape)
