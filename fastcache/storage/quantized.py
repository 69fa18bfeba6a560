# SPDX-License-Identifier: Apache-2.0
"""A ring in float8."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import direct
from .allocate import FP8, allocate
from .history import Timeline
from .ring import Ring, fitting, part, tail

_quantize = direct("_quantize_store_")


_dequantize = direct("_quantized_combine_")


class Quantized(Ring):
    """A ring whose rows lie in float8 e4m3, with one scale per token: a quarter of the bytes of float32."""

    __slots__ = ("scales",)
    kept = ("rows", "scales")

    def __init__(self, value: Tensor, timeline: Timeline) -> None:
        super().__init__(value, timeline, FP8)
        self.scales = allocate(self.buffer.shape[:-1], torch.float32, value.device)

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        if not torch.compiler.is_compiling():
            row = self.timeline.next_row
            _quantize(tail(self.views[row], y), tail(self.scales[row], y[..., 0]), y, x)
            self.mark()
            return
        r = y.float() if x is None else y.float() - x.float()
        largest = r.abs().amax(dim=-1)
        scale = torch.where(
            largest < 2.0**-117, 1.0, largest / 448
        )  # as in reference.quantize_store
        q = (r * (1 / scale)[..., None]).to(FP8)
        # moved as bytes: not every backend indexes float8
        self._write(part(self.buffer, y).view(torch.uint8), q.view(torch.uint8))
        self._write(part(self.scales, y), scale)

    def predict(self, base: Tensor | None, weights: Sequence[float] | Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._predict_compiled(base)
        first = None if base is None else base[..., 0]
        held = self.timeline.rows[: len(weights)]
        rows = [fitting(self.views[r], base) for r in held]
        out = torch.empty_like(rows[0], dtype=self.dtype, memory_format=torch.contiguous_format)
        scales = [tail(self.scales[r], first) for r in held]
        _dequantize(out, base, rows, scales, list(weights))
        return out

    def newest_first(self, like: Tensor | None, tokens: int = 1) -> list[Tensor]:
        """All rows as values, newest first, in compiled code; all their tokens, since no guide looks at them."""
        rows = self._read(part(self.buffer, like).view(torch.uint8))
        scales = self._read(part(self.scales, like))
        return [q.view(FP8).float() * s[..., None] for q, s in zip(rows, scales, strict=True)]

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        super().move(to)
        self.scales = to(self.scales)
