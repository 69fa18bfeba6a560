# SPDX-License-Identifier: Apache-2.0
"""Watching how the values of a run's steps lie to each other: their Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..cache import Cache
from ..calibration.grams import Grams
from ..runtime.denoiser import Denoiser
from .first_block import sampled
from .gram import Trajectory, gathered


@contextmanager
def watch_trajectories(cache: Cache) -> Iterator[Grams]:
    """Watch what every model's first rule stores while the context is open; the dict is filled at its end.

    By (model, context), for each run the Gram matrix of the values of its steps.
    """
    watchers = [TrajectoryWatcher(denoiser) for denoiser in cache.denoisers]
    found: Grams = {}
    try:
        yield found
    finally:
        for watcher in watchers:
            watcher.handle.remove()
    found.update(gathered(watchers))


class TrajectoryWatcher:
    """Keeps an evenly spaced sample of what each computed step stores, of all segments of a stack together."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.trajectory = denoiser, Trajectory()
        self.handle = denoiser.model.register_forward_hook(self.left)

    def left(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = self.denoiser.control.state
        if state is None or not state.units[0]:
            return
        row, units = state.timelines[0].rows[0], state.units[0].values()
        value = torch.cat([sampled(unit.streams[0].views[row]) for unit in units])
        self.trajectory.keep(state.key, state.armed_step or 0, value)
