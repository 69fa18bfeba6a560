# SPDX-License-Identifier: Apache-2.0
"""Sums of more tensors than a kernel takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def in_passes(
    run: Callable[[Tensor, Sequence[Tensor], Any], Any],
    most: int,
    out: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
) -> None:
    """out <- sum_i weights[i] * tensors[i] by a kernel that takes `most` terms; `out` may be one of them.

    All launches but the last write into a tensor of their own, rounded to the dtype of `out`.
    """
    while len(tensors) > most:
        total = torch.empty_like(out)
        run(total, tensors[:most], weights[:most])
        tensors = [total, *tensors[most:]]
        if isinstance(weights, Tensor):
            weights = torch.cat([torch.ones_like(weights[:1]), weights[most:]])
        else:
            weights = [1.0, *weights[most:]]
    run(out, tensors, weights)
