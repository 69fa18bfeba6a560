# SPDX-License-Identifier: Apache-2.0
"""Watching how the residuals of a run's steps lie to each other: their Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import sync
from ..cache import Cache
from ..runtime.denoiser import Denoiser
from .first_block import sampled

Gram = list[list[float]]


@contextmanager
def watch_trajectories(cache: Cache) -> Iterator[dict[tuple[str, str], list[Gram]]]:
    """Watch what every model's first rule stores while the context is open; the dict is filled at its end.

    By (model, context), for each run the Gram matrix of the values of its steps, in float64.
    """
    watchers = [TrajectoryWatcher(denoiser) for denoiser in cache.denoisers]
    found: dict[tuple[str, str], list[Gram]] = {}
    try:
        yield found
    finally:
        for watcher in watchers:
            watcher.handle.remove()
    for watcher in watchers:
        for context, grams in watcher.grams().items():
            found[watcher.denoiser.name, context] = grams


class TrajectoryWatcher:
    """Keeps an evenly spaced sample of what each computed step stores, of all segments of a stack together."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.running: dict[Any, list[Tensor]] = {}  # by state: the values of its steps
        self.done: dict[str, list[Tensor]] = {}  # Gram matrices by context
        self.handle = denoiser.model.register_forward_hook(self.left)

    def left(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = self.denoiser.control.state
        if state is None or not state.units[0]:
            return
        step, key, row = state.armed_step or 0, state.key, state.timelines[0].rows[0]
        if step == 0:
            self._finish(key)
        units = state.units[0].values()
        value = torch.cat([sampled(unit.streams[0].views[row]).double() for unit in units])
        kept = self.running.setdefault(key, [])
        if len(kept) == step and (not kept or kept[0].shape == value.shape):
            kept.append(value)

    def _finish(self, key: Any) -> None:
        values = self.running.pop(key, [])
        if values:
            rows = torch.stack(values)
            self.done.setdefault(key[1], []).append(rows @ rows.T)

    def grams(self) -> dict[str, list[Gram]]:
        for key in list(self.running):
            self._finish(key)
        found: dict[str, list[Gram]] = {}
        for context, matrices in self.done.items():
            for matrix in matrices:
                n, numbers = len(matrix), sync.numbers([matrix])
                rows = [numbers[i * n : (i + 1) * n] for i in range(n)]
                found.setdefault(context, []).append(rows)
        return found
