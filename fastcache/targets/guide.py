# SPDX-License-Identifier: Apache-2.0
"""The guide of a stack: what is looked at on every step, its history, and the weights it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import direct
from ..policies import COMPUTE, REUSE
from ..predictors import Predictor
from ..storage.allocate import allocate
from ..storage.group import SlotGroup
from ..storage.ring import Ring, fitting, tail, thinned
from ..storage.state import State

_guide = direct("_guide_into_")
_check = direct("_check_into_")


class GuideSlots(SlotGroup):
    """guides: their history. weights: of a base, 1, and of depth values, float32. misfit: of the last forecast, [1].
    prior: what the ridge pulls toward, [depth - 1]. before: the same for the newest value from older ones, [depth - 2].
    """

    __slots__ = ("before", "guides", "misfit", "prior", "weights")
    holds = ("weights", "misfit", "prior", "before")
    parts = ("guides",)
    before: Any
    guides: Any
    misfit: Any
    prior: Any
    weights: Any


class Guide:
    """Keeps guides of computed steps, and on reused ones leaves weights and misfit in static slots."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def of(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """The guide y - x (or y), every n-th token of [..., tokens, width]."""
        seen = [thinned(t.detach(), self.predictor.tokens) for t in (y, x) if t is not None]
        return seen[0] if x is None else seen[0] - seen[1]

    def see(self, state: State, rule: int, action: str, guide: Tensor) -> None:
        """Take in the guide of the running step: keep it, or read the weights off it."""
        with torch.no_grad():
            slots: GuideSlots = state.slots[rule].guide
            if not torch.compiler.is_compiling() and not _fits(slots.guides, guide, action):
                self._hold(state, rule, guide)
            if action == REUSE:
                self._find(state, rule, guide)
            elif action == COMPUTE:
                slots.guides.store(guide, None, 0)

    def _find(self, state: State, rule: int, guide: Tensor) -> None:
        """Leave the weights that the guide of the running step gives, and their misfit."""
        slots: GuideSlots = state.slots[rule].guide
        rows, ridge = slots.guides.newest_first(guide), self.predictor.ridge
        found = (slots.weights, slots.misfit, guide, rows)
        if not self.predictor.checked:
            _guide(*found, slots.prior, ridge)
            return
        streams: list[Any] = [unit.streams[0] for unit in state.units[rule].values()]
        kept = [row for s in streams for row in s.newest_first(None, self.predictor.tokens)]
        values = [tail(row, guide) for row in kept]  # of half a guidance batch, that half
        _check(*found, values, slots.prior, slots.before, ridge)

    def prepare_like(self, state: State, other: State, rule: int) -> None:
        """Have storage for guides such as another state's, where that has any."""
        held = other.slots[rule].guide.guides
        if held is not None:
            self._hold(state, rule, held.views[0])

    def _hold(self, state: State, rule: int, guide: Tensor) -> None:
        slots: GuideSlots = state.slots[rule].guide
        depth, device = self.predictor.depth, guide.device
        slots.guides = Ring(guide, state.timelines[rule])
        slots.weights = allocate((depth + 1,), torch.float32, device)
        slots.misfit = allocate((1,), torch.float32, device)
        slots.prior = allocate((depth - 1,), torch.float32, device)
        if self.predictor.checked:
            slots.before = allocate((depth - 2,), torch.float32, device)

    def stage(self, state: State, rule: int, prior: tuple[float, ...]) -> None:
        """Have the device hold the prior of this step."""
        slots: GuideSlots = state.slots[rule].guide
        slots.put("prior", prior)
        if self.predictor.checked:
            newest, *older = state.timelines[rule].steps
            before = self.predictor.weights(tuple(older), newest) if older else prior
            slots.put("before", before[: self.predictor.depth - 2])


def _fits(guides: Ring | None, guide: Tensor, action: str) -> bool:
    """Whether there is storage for such a guide; one that is only looked at raises where it does not fit."""
    if guides is None:
        return False
    row = guides.views[0]
    if action != COMPUTE:
        fitting(row, guide)
        return True
    held, now = (row.shape, row.dtype, row.device), (guide.shape, guide.dtype, guide.device)
    return held == now or (held[0][1:], *held[1:]) == (now[0][1:], *now[1:])
