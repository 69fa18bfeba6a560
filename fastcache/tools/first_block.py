# SPDX-License-Identifier: Apache-2.0
"""Watching how the first block's residual changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from .gram import Trajectory, gathered

GAP = 32  # first-block changes are kept against this many earlier steps


SAMPLE = 1 << 18  # elements of a first-block residual that are compared, evenly spaced


@contextmanager
def watch_first_blocks(
    cache: Cache, guides: dict[str, Grams]
) -> Iterator[dict[tuple[str, str], list[list[float]]]]:
    """Watch the first block of every model while the context is open; the dicts are filled at its end.

    By (model, context), row i: relative L1 change of the residual at step i against i-1, i-2, ... guides: gets the
    Gram matrices of that residual as "residual".
    """
    watchers = [FirstBlockWatcher(denoiser, cache.adapter) for denoiser in cache.denoisers]
    changes: dict[tuple[str, str], list[list[float]]] = {}
    try:
        yield changes
    finally:
        for watcher in watchers:
            watcher.handle.remove()
    for watcher in watchers:
        for context, rows in watcher.rows().items():
            changes[watcher.denoiser.name, context] = rows
    if seen := gathered(watchers):
        guides["residual"] = seen


class FirstBlockWatcher:
    """Compares the residual of a model's first block with those of earlier steps, on the device."""

    def __init__(self, denoiser: Denoiser, adapter: BlockAdapter | None) -> None:
        row = adapter or adapter_for(denoiser.model)
        block = block_lists(denoiser.model, row)[0][1]._modules["0"]
        self.denoiser, self.io = denoiser, BlockIO(block, row.block)
        self.samples: dict[Any, list[Tensor]] = {}  # newest first
        self.sums: dict[Any, list[list[Tensor]]] = {}
        self.trajectory = Trajectory()
        self.before: Tensor | None = None
        # the input is read before the block runs, since the block may write into it
        pre = block.register_forward_pre_hook(self.entering, with_kwargs=True)
        post = block.register_forward_hook(self.left, with_kwargs=True)
        self.handle = _Both(pre, post)

    def entering(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, _ = self.io.read(args, kwargs)
        self.before = sampled(hidden).clone()

    def left(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        hidden, encoder = self.io.read(args, kwargs)
        at, _ = self.io.positions(output, hidden, encoder, None)
        state = self.denoiser.control.state
        if state is None or self.before is None:
            return
        index, key = state.armed_step or 0, state.key
        if index == 0 or key not in self.samples:
            self.samples[key], self.sums[key] = [], []
        after, before = sampled(output if at is None else output[at]), self.before
        if after.shape != before.shape:
            return
        kept = self.samples[key]
        self.sums[key].append(
            [torch.ops.fastcache.residual_l1.default(after, before, prev) for prev in kept]
        )
        residual = torch.empty_like(after)
        torch.ops.fastcache.residual_store_.default(residual, after, before)
        self.samples[key] = [residual, *kept[: GAP - 1]]
        self.trajectory.keep(key, index, residual)

    def rows(self) -> dict[str, list[list[float]]]:
        """Changes by context, of the last run where there were several."""
        found = {}
        for (_, context), steps in self.sums.items():
            numbers = iter(sync.numbers([s for row in steps for s in row]))
            found[context] = [
                [relative(next(numbers), next(numbers)) for _ in row] for row in steps
            ]
        return found


@dataclass
class _Both:
    pre: Any
    post: Any

    def remove(self) -> None:
        self.pre.remove()
        self.post.remove()


def sampled(value: Tensor) -> Tensor:
    """At most SAMPLE values of a hidden state, evenly spaced, [n]."""
    flat = value.detach().reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLE)].contiguous()


def relative(change: float, size: float) -> float:
    """change / size to six digits; 1e30, which is above any threshold, where that is not finite."""
    value = change / size if size else math.inf
    return float(f"{value:.6g}") if math.isfinite(value) else 1e30
