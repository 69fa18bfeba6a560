# SPDX-License-Identifier: Apache-2.0
"""What a cache tells of itself: names, bytes, a summary in words, a picture, a progress line."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..ops import dispatch
from ..recipe import Recipe
from ..runtime.denoiser import Denoiser
from ..runtime.methods import Methods
from ..runtime.settings import Settings
from ..runtime.stats import Stats
from ..storage.pool import SPARE
from .progress import progress
from .summary import summarise


class Telling:
    """The half of a `Cache` that only looks."""

    recipe: Recipe
    settings: Settings
    stats: Stats
    models: Sequence[tuple[str, nn.Module]]
    denoisers: Sequence[Denoiser]
    methods: Methods

    @property
    def model_names(self) -> str:
        """Classes of the models, as words."""
        return ", ".join(dict.fromkeys(type(model).__name__ for _, model in self.models))

    def hooked(self) -> dict[str, list[str]]:
        """Dotted names of what the cache's own recipe hooks, per denoiser; empty once disabled."""
        return {d.name: [name for t in d.targets for name in t.hooked()] for d in self.denoisers}

    def nbytes(self) -> int:
        """Bytes of cached tensors, a count."""
        return sum(pool.nbytes() for pool in self.methods.pools)

    def summary(self) -> str:
        """In words: what is hooked, steps computed and reused and why, bytes held, kernel backend."""
        device = next(
            (str(p.device.type) for d in self.denoisers for p in d.model.parameters()), "cpu"
        )
        backend = self.settings.backend
        kernels = backend if backend != dispatch.AUTO else dispatch.active(device)
        return summarise(self.recipe, self.stats, self.hooked(), self.nbytes(), kernels)

    def __repr__(self) -> str:
        return f"<fastcache.Cache {self.recipe.name} on {[d.name for d in self.denoisers]}, {self.stats!r}>"

    def plot(self, path: str | Path) -> Path:
        """Draw signal against threshold, the decisions per step and the bytes held into a picture.

        Args:
            path: where to write it; its ending chooses the format, as for matplotlib.
        Returns:
            The path, as a Path.
        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there was no denoiser call yet.
        """
        from .plots import plot_run

        held: dict[str, int] = {}
        for d in self.methods:
            for name, size in d.pool.held().items():
                label = f"{d.name} {name}" if len(self.denoisers) > 1 and name != SPARE else name
                held[label] = held.get(label, 0) + size
        return plot_run(self.stats, self.recipe, held, path)

    def progress(
        self, total: int | None = None, **options: Any
    ) -> contextlib.AbstractContextManager[Any]:
        """A progress line of denoiser calls and how many of them were reused; see `fastcache.progress`.

        Args:
            total: calls expected, steps times contexts, a count; None where not known.
            options: further keywords of `tqdm.tqdm`.
        Returns:
            A context manager whose target is the tqdm object.
        Raises:
            ImportError: tqdm is not installed.
        """
        return progress(self, total, **options)
