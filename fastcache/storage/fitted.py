# SPDX-License-Identifier: Apache-2.0
"""A ring whose weights are fitted to its own rows, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import direct
from .history import Timeline
from .ring import Ring, part, tail, thinned, weighted

_fit = direct("_exponential_weights")


class Fitted(Ring):
    """The last values of one tensor, forecast by exponentials in them (see `DMD`); every n-th token is looked at."""

    __slots__ = ("ridge", "tokens")

    def __init__(
        self,
        value: Tensor,
        timeline: Timeline,
        kept: torch.dtype | None,
        ridge: float,
        tokens: int,
    ) -> None:
        super().__init__(value, timeline, kept if value.is_floating_point() else None)
        self.ridge, self.tokens = ridge, tokens

    def predict(self, base: Tensor | None, weights: Sequence[float] | Tensor) -> Tensor:
        """base + the forecast; weights: (reach in gaps, 1 where exponentials are to be fitted)."""
        if torch.compiler.is_compiling():
            reach, fits = self.timeline.staged.weights[:2].split(1)
            return self.predict_weighted(base, self._staged(base, reach, fits))
        reach, fits = weights
        rows = [tail(self.views[r], base) for r in self.timeline.rows]
        if fits and rows[0].is_floating_point():
            ahead = torch.full((1,), reach, device=self.buffer.device)
            seen = [thinned(row, self.tokens) for row in rows]
            return self.predict_weighted(base, self._fitted(seen, ahead))
        line = (1.0 + reach, -reach) if reach else (1.0,)
        return weighted(rows[: len(line)], line, base, self.dtype)

    def _staged(self, base: Tensor | None, reach: Tensor, fits: Tensor) -> Tensor:
        """The weights in compiled code, where the history may be short, and zeros stand for what it lacks."""
        one = torch.ones_like(reach)
        line = torch.cat([one, one + reach, -reach, torch.zeros_like(reach)])
        rows = part(self.buffer, base)
        if not rows.is_floating_point():
            return line
        fitted = self._fitted(self._read(thinned(rows, self.tokens, stacked=True)), reach)
        return torch.where(fits > 0, fitted, line)

    def _fitted(self, rows: list[Tensor], reach: Tensor) -> Tensor:
        found: Tensor = _fit(rows, reach, self.ridge)
        return found
