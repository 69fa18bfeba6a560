# SPDX-License-Identifier: Apache-2.0
"""Where ops put their results, where nobody has given them a place."""

from __future__ import annotations

import torch
from torch import Tensor


def sums_for(y: Tensor, width: int, per_sample: bool, given: Tensor | None = None) -> Tensor:
    """Where float32 sums over y go: what was given, else a new [width], or [B, width] per sample."""
    if given is None:
        # half as long as y.new_empty takes with a dtype
        shape = (y.shape[0], width) if per_sample else width
        return torch.empty(shape, dtype=torch.float32, device=y.device)
    return given


def weights_for(sums: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Where float32 weights [S, terms] and misfits [S] that follow from sums [S, M] go."""
    samples = sums.shape[0]
    weights = torch.empty((samples, terms), dtype=torch.float32, device=sums.device)
    return weights, torch.empty(samples, dtype=torch.float32, device=sums.device)
