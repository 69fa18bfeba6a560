# SPDX-License-Identifier: Apache-2.0
"""How much of a guide its own history leaves unexplained."""

from __future__ import annotations

from torch import Tensor

from ...policies import REUSE
from ...storage.state import State
from .base import Meter


class GuideMisfit(Meter):
    """The misfit that the guide of a forecast leaves behind, a relative norm; its history has to be full."""

    needs_history = True

    def measure(self, state: State, y: Tensor, x: Tensor | None) -> Tensor | None:
        assert self.guide is not None
        self.guide.see(state, self.rule, REUSE, self.guide.of(y, x))
        return state.slots[self.rule].guide.misfit

    def left(self, state: State) -> Tensor:
        return state.slots[self.rule].guide.misfit
