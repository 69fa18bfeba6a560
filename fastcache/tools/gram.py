# SPDX-License-Identifier: Apache-2.0
"""How the values of a run's steps lie to each other: their Gram matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import sync
from ..calibration.grams import Gram, Grams
from ..runtime.denoiser import Denoiser


class Keeper(Protocol):
    """A watcher of one model that keeps a trajectory."""

    denoiser: Denoiser
    trajectory: Trajectory


class Trajectory:
    """One value of every step of a run, until the next run begins; then their Gram matrix, in float64."""

    def __init__(self) -> None:
        self.running: dict[Any, list[Tensor]] = {}  # by state: the values of its steps
        self.done: dict[str, list[Tensor]] = {}  # Gram matrices by context

    def keep(self, key: Any, step: int, value: Tensor) -> None:
        """key: of the state, (request, context). value: [n], of a computed step."""
        if step == 0:
            self._finish(key)
        kept, value = self.running.setdefault(key, []), value.to(torch.float64, copy=True)
        if len(kept) == step and (not kept or kept[0].shape == value.shape):
            kept.append(value)

    def _finish(self, key: Any) -> None:
        values = self.running.pop(key, [])
        if values:
            rows = torch.stack(values)
            self.done.setdefault(key[1], []).append(rows @ rows.T)

    def grams(self) -> dict[str, list[Gram]]:
        """By context, one matrix per run."""
        for key in list(self.running):
            self._finish(key)
        found: dict[str, list[Gram]] = {}
        for context, matrices in self.done.items():
            for matrix in matrices:
                n, numbers = len(matrix), sync.numbers([matrix])
                rows = [numbers[i * n : (i + 1) * n] for i in range(n)]
                found.setdefault(context, []).append(rows)
        return found


def gathered(watchers: Iterable[Keeper]) -> Grams:
    """The matrices of all watched models, by (model, context)."""
    return {
        (watcher.denoiser.name, context): grams
        for watcher in watchers
        for context, grams in watcher.trajectory.grams().items()
    }
