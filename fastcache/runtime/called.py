# SPDX-License-Identifier: Apache-2.0
"""The half of a cache that frames and denoisers call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..storage.pool import Slots
from .compiling import watch_compiling
from .context import Context
from .denoiser import Denoiser
from .frames import innermost, method_of
from .generation import Generation
from .methods import Method, Methods
from .runs import abandon
from .settings import Settings
from .stats import Stats


class Called:
    """What happens to a cache where something is opened or closed around a call."""

    lock: Any
    stats: Stats
    settings: Settings
    methods: Methods
    denoisers: Sequence[Denoiser]
    told: Callable[[Any], Any] | None = None

    def loop(self, steps: int | None) -> None:
        """Another loop over timesteps begins in the generation that runs.

        Args:
            steps: of that loop, a count; None where it is not known.
        """
        frame = innermost(self)
        if frame is not None and frame.generation is not None:
            frame.generation.loop(steps)

    def ended(self, generation: Generation, failed: bool) -> None:
        """Forget the runs of a generation that is over.

        Args:
            generation: the one that `run` has opened, or a pipeline's call.
            failed: whether an exception has ended it, as a bool; then whatever it holds is given up.
        """
        method = generation.method
        if method is not None:
            method.runs.discard(generation)
        if failed:
            with self.lock:
                abandon(self._pools_of(method), generation.request)
        for denoiser in self.denoisers if method is None else method.denoisers:
            denoiser.forget(generation.request)
        if not failed:
            self.settings.notices.emit()

    def _pools_of(self, method: Method | None) -> list[Slots]:
        return (self.settings if method is None else method.settings).pools

    def hook(self) -> None:
        """Have what the cache's own recipe hooks stand in the models, and not what those of runs do."""
        self.methods.hook()

    def prepare(self, frame: Context) -> bool:
        """Get every denoiser ready for a compiled call.

        Args:
            frame: the context that opens.
        Returns:
            A bool: False where the call must run eagerly.
        """
        if not watch_compiling():
            return True
        generation = frame.generation
        if generation is not None and generation.method is not None:  # nothing of it is prepared
            return all(denoiser.ahead.owns_graphs for denoiser in self.denoisers)
        ready = True
        for denoiser in self.denoisers:
            ready &= denoiser.ahead.prepare(frame)
        return ready

    def commit_prepared(self, frame: Context, failed: bool) -> None:
        """Account for a context that closes.

        Args:
            frame: the context.
            failed: whether an exception leaves it, as a bool; then its request's runs are given up.
        """
        for denoiser in self.denoisers:
            if denoiser.ahead.prepared is not None:
                denoiser.ahead.commit_prepared(frame, failed)
        if failed:
            with self.lock:
                abandon(self._pools_of(method_of(frame)), frame.request)
        elif not frame.calls and (told := self.stats.uncalled()):
            self.settings.notices.once(told)
