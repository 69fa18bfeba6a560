"""The guide of a stack: what is looked at on every step, its history, and the weights it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import direct
from ..policies import COMPUTE, REUSE
from ..predictors import Guided
from ..storage.allocate import allocate
from ..storage.ring import Ring, fitting
from ..storage.state import State

_weights = direct("guided_weights")


class Guide:
    """Keeps guides of computed steps, and on reused ones leaves weights and misfit in static slots."""

    def __init__(self, predictor: Guided) -> None:
        self.predictor = predictor

    def of(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """The guide y - x (or y), every n-th token of [..., tokens, width]."""
        thin = lambda t: t.detach()[..., :: self.predictor.tokens, :] if t.dim() > 2 else t.detach()  # noqa: E731
        return thin(y) if x is None else thin(y) - thin(x)

    def see(self, state: State, rule: int, action: str, guide: Tensor) -> None:
        """Take in the guide of the running step: keep it, or read the weights off it."""
        with torch.no_grad():
            head = state.head
            if not torch.compiler.is_compiling() and not self._fits(head, guide, action):
                head["guides"] = Ring(guide, state.timelines[rule])
                head["weights"] = allocate((self.predictor.depth + 1,), torch.float32, guide.device)
                head["misfit"] = allocate((1,), torch.float32, guide.device)
                head["prior"] = allocate((self.predictor.order,), torch.float32, guide.device)
            if action == REUSE:
                rows = head["guides"].newest_first(guide)
                weights, misfit = _weights(guide, rows, head["prior"], self.predictor.ridge)
                head["weights"].copy_(weights[0])
                head["misfit"].copy_(misfit)
            elif action == COMPUTE:
                head["guides"].store(guide, None, 0)

    @staticmethod
    def _fits(head: dict, guide: Tensor, action: str) -> bool:
        """Whether there is storage for such a guide; one that is only looked at raises where it does not fit."""
        if "guides" not in head:
            return False
        row = head["guides"].views[0]
        if action != COMPUTE:
            fitting(row, guide)
            return True
        held, now = (row.shape, row.dtype, row.device), (guide.shape, guide.dtype, guide.device)
        return held == now or (held[0][1:], *held[1:]) == (now[0][1:], *now[1:])

    def stage(self, state: State, prior: tuple[float, ...]) -> None:
        """Have the device hold the prior of this step."""
        state.put("prior", prior)
