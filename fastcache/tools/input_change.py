# SPDX-License-Identifier: Apache-2.0
"""Watching how the model's output changes with the first block's modulated input, from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import sync
from ..cache import Cache
from ..calibration.grams import Grams
from ..models.adapter import BlockAdapter
from ..models.attention import block_lists
from ..models.block_io import BlockIO
from ..models.registry import adapter_for
from ..runtime.denoiser import Denoiser
from ..targets.meters.model_input import together
from ..targets.outputs import first_value
from .first_block import relative, sampled
from .gram import Trajectory, gathered

Pairs = list[tuple[float, float]]


@contextmanager
def watch_inputs(cache: Cache, guides: dict[str, Grams]) -> Iterator[dict[tuple[str, str], Pairs]]:
    """Watch every model whose modulation is known while the context is open; the dicts are filled at its end.

    By (model, context), for each step after a run's first: relative L1 change of the first block's modulated input
    against the step before, and that of the model's output. guides: gets the Gram matrices of that input as
    "modulated".
    """
    watchers = [InputWatcher(denoiser, cache.adapter) for denoiser in cache.denoisers]
    found: dict[tuple[str, str], Pairs] = {}
    try:
        yield found
    finally:
        for watcher in watchers:
            watcher.remove()
    for watcher in watchers:
        for context, pairs in watcher.pairs().items():
            found[watcher.denoiser.name, context] = pairs
    if seen := gathered(watchers):
        guides["modulated"] = seen


class InputWatcher:
    """Compares what enters a model's first block and what the model returns with the step before, on the device."""

    def __init__(self, denoiser: Denoiser, adapter: BlockAdapter | None) -> None:
        row = adapter or adapter_for(denoiser.model)
        block = block_lists(denoiser.model, row)[0][1]._modules["0"]
        self.denoiser, self.io = denoiser, BlockIO(block, row.block)
        self.trajectory = Trajectory()
        self.entered: Tensor | None = None  # of the running call
        self.before: dict[Any, tuple[int, Tensor, Tensor]] = {}  # by state: step, input, output
        self.sums: dict[str, list[Tensor]] = {}  # by context
        self.handles: list[Any] = []
        if self.io.modulation is not None and block is not None:
            self.handles = [
                block.register_forward_pre_hook(self.entering, with_kwargs=True),
                denoiser.model.register_forward_hook(self.left),
            ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def entering(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered = sampled(self.io.modulated(block, args, kwargs)).float()

    def left(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state, entered, self.entered = self.denoiser.control.state, self.entered, None
        value = together(first_value(output))
        if state is None or entered is None or not isinstance(value, Tensor):
            return
        step, now = state.armed_step or 0, sampled(value).float()
        self.trajectory.keep(state.key, step, entered)
        at, *before = self.before.get(state.key, (step, entered, now))
        if at == step - 1 and [b.shape for b in before] == [entered.shape, now.shape]:
            both = zip((entered, now), before, strict=True)
            sums = [s for new, old in both for s in ((new - old).abs().sum(), old.abs().sum())]
            self.sums.setdefault(state.key[1], []).append(torch.stack(sums))
        self.before[state.key] = step, entered.clone(), now.clone()

    def pairs(self) -> dict[str, Pairs]:
        found = {}
        for context, sums in self.sums.items():
            numbers = iter(sync.numbers(sums))
            found[context] = [
                (relative(next(numbers), next(numbers)), relative(next(numbers), next(numbers)))
                for _ in sums
            ]
        return found
