"""Lists whose residuals are one."""

from __future__ import annotations

from torch import Tensor

from ... import sync


def chained(left: Tensor, entered: Tensor) -> bool:
    """Whether one list goes on where the other stopped, perhaps with the text joined in front."""
    if left.shape == entered.shape:
        return sync.same(left, entered)
    joined = left.dim() == entered.dim() == 3 and entered.shape[1] > left.shape[1]
    return joined and sync.same(left, entered[:, -left.shape[1] :])
