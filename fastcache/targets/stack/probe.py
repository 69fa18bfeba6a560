"""The first block, which always runs, and its change."""

from __future__ import annotations

from torch import Tensor

from ...storage.ring import tail
from ...storage.state import State
from .target import residual_change


def first_change(state: State, hidden: Tensor, x: Tensor, per_sample: bool) -> Tensor | None:
    """The two sums of the first block's residual against that of the last computed step; None without one.

    [2], or per sample [B, 2].
    """
    if "kept" not in state.head:
        return None
    hidden = hidden.detach() if hidden.requires_grad else hidden
    x = x.detach() if x.requires_grad else x
    return residual_change(hidden, x, tail(state.head["residual"], x), per_sample)
