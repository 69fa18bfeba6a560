# SPDX-License-Identifier: Apache-2.0
"""The low frequencies of a field, without a Fourier transform on skipped steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Guidance


def low_pass(value: Tensor, where: Guidance) -> Tensor:
    """The part of `value` inside a disc of radius min(H, W) // 5 around frequency zero, as a real tensor.

    Transforms the last two dimensions of the layout `where.tensor_format`. Source: diffusers 0.42.1.
    """
    if where.tensor_format == "BSC":
        grid = where.grid
        if grid is None:
            raise ValueError(
                "tensor_format: the output is a token sequence; Guidance(tensor_format='BSC', grid=(height, width)) "
                "needs its grid"
            )
        batch, tokens, channels = value.shape
        spatial = value.movedim(2, 1).reshape(batch, channels, *grid)
        return _disc(spatial).reshape(batch, channels, tokens).movedim(1, 2)
    if value.dim() != len(where.tensor_format):
        raise ValueError(
            f"tensor_format: is {where.tensor_format!r}, but the model's output has shape {tuple(value.shape)}; "
            "for token sequences [batch, tokens, channels] use fastcache.Guidance(tensor_format='BSC', grid=(...))"
        )
    return _disc(value)


def _disc(value: Tensor) -> Tensor:
    height, width = value.shape[-2:]
    rows = torch.fft.fftfreq(height, 1.0 / height, device=value.device)[:, None]
    columns = torch.fft.rfftfreq(width, 1.0 / width, device=value.device)[None, :]
    radius = min(height, width) // 5
    mask = rows**2 + columns**2 <= radius**2
    return torch.fft.irfft2(torch.fft.rfft2(value) * mask, s=(height, width))
