# SPDX-License-Identifier: Apache-2.0
"""The recipes on the models of one cache: its own, and those that single runs bring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from torch import nn

from ..models.adapter import BlockAdapter
from ..models.registry import adapter_for
from ..recipe import Recipe
from ..storage.pool import Slots
from .denoiser import Denoiser
from .frames import Owner, innermost, method_of
from .settings import Settings

KEPT = 8  # recipes of runs that are over, kept for the next run that brings the same


class Method:
    """A recipe bound to every model of a cache, with storage of its own. Nothing is hooked yet.

    config: what has been given as one, or None. runs: the generations that have it.
    """

    def __init__(
        self,
        owner: Owner,
        settings: Settings,
        models: Sequence[tuple[str, nn.Module]],
        adapter: BlockAdapter | None,
        recipe: Recipe,
        config: Any,
    ) -> None:
        self.recipe, self.config, self.runs = recipe, config, WeakSet[Any]()
        self.settings = replace(settings, pools=[])
        self.denoisers = [
            Denoiser(owner, self.settings, name, m, recipe, adapter or adapter_for(m))
            for name, m in models
        ]
        self.settings.pools[:] = [denoiser.pool for denoiser in self.denoisers]

    def means(self, recipe: Recipe, config: Any) -> bool:
        """Whether these settings are the same."""
        return recipe == self.recipe and _clock(config) == _clock(self.config)


def _clock(config: Any) -> Any:
    """What beside its recipe a config has to say: where the running timestep comes from."""
    return (None, False) if config is None else (config.timestep_callback, config.wants_timestep)


class Switch:
    """Takes the calls of one model once its runs may have recipes of their own: each goes to the denoiser of its
    run's recipe, whose targets then stand in the model. One call runs at a time, so they can be exchanged before it.

    own: the denoiser of the cache's own recipe. place: its number among those of the cache.
    """

    def __init__(self, own: Denoiser, place: int) -> None:
        self.place = place
        self.take(own)

    def take(self, own: Denoiser) -> None:
        """The cache has a recipe of its own, whose denoiser stands in the model."""
        self.own: Denoiser = own
        self.hooked: Denoiser | None = own
        own.switch, own.patch.call, own.patch.reset = self, self.call, self.reset

    def hook(self, denoiser: Denoiser | None) -> None:
        """Have its targets stand in the model, and no others; None: none at all."""
        if denoiser is self.hooked:
            return
        if self.hooked is not None:
            self.hooked.unhook()
        self.hooked = denoiser
        if denoiser is not None:
            denoiser.hook()

    def meant(self) -> Denoiser:
        """The denoiser of what is open around this call."""
        method = method_of(innermost(self.own.owner))
        found: Denoiser = self.own if method is None else method.denoisers[self.place]
        return found

    @property
    def inside(self) -> bool:
        """Whether the model's forward is running."""
        return self.hooked is not None and self.hooked.control.inside

    def call(
        self, args: tuple, kwargs: dict, run_of: Callable[[Denoiser], Callable] | None = None
    ) -> Any:
        """The model's forward. run_of: what stands in for it in compiled calls, by denoiser."""
        with self.own.lock:
            if not self.inside:
                self.hook(self.meant())
            hooked = self.hooked
            assert hooked is not None
            return hooked.call(args, kwargs, None if run_of is None else run_of(hooked))

    def reset(self, request: Any) -> None:
        """The model's own event that a run is over."""
        self.meant().reset(request)


class Methods:
    """All recipes on the models of one cache.

    pools: the storage of all of them, a list that the budget watches.
    """

    def __init__(
        self,
        owner: Owner,
        models: Sequence[tuple[str, nn.Module]],
        adapter: BlockAdapter | None,
        pools: list[Slots],
    ) -> None:
        self.owner, self.models, self.adapter, self.pools = owner, models, adapter, pools
        self.own: Any = None  # the cache's own Method; None once it is disabled
        self.others: list[Method] = []  # of runs, the latest last
        self.switches: list[Switch] = []  # of the models, once there are others

    def __iter__(self) -> Iterator[Denoiser]:
        """All denoisers, those of the cache's own recipe first."""
        for method in (self.own, *self.others):
            if method is not None:
                yield from method.denoisers

    def _bound(self, settings: Settings, recipe: Recipe, config: Any) -> Method:
        return Method(self.owner, settings, self.models, self.adapter, recipe, config)

    def attach(self, settings: Settings, recipe: Recipe, config: Any) -> Method:
        """Make this the cache's own recipe; there is none now. All or nothing."""
        method = self._bound(settings, recipe, config)
        try:
            for denoiser in method.denoisers:
                denoiser.install()
        except BaseException:
            for denoiser in method.denoisers:
                denoiser.remove()
            raise
        self.own = method
        for switch, denoiser in zip(self.switches, method.denoisers, strict=False):
            switch.take(denoiser)
        self._tidy()
        return method

    def find(self, recipe: Recipe, config: Any) -> Method | None:
        """The method of these settings, where there is one."""
        return next((m for m in (self.own, *self.others) if m.means(recipe, config)), None)

    def add(self, settings: Settings, recipe: Recipe, config: Any) -> Method:
        """A recipe that single runs have beside the cache's own. Nothing changes where it does not fit.

        Raises ValueError as `enable` does.
        """
        if not self.switches:
            self.switches = [Switch(d, i) for i, d in enumerate(self.own.denoisers)]
        if any(switch.inside for switch in self.switches):
            raise ValueError(
                "run: recipe: a call of the model is running around this; bring the recipe before the call"
            )
        before = [switch.hooked for switch in self.switches]
        try:  # what a model is made of is read with nothing standing in it
            for switch in self.switches:
                switch.hook(None)
            method = self._bound(replace(settings, own=False), recipe, config)
        finally:
            for switch, hooked in zip(self.switches, before, strict=True):
                switch.hook(hooked)
        for denoiser in method.denoisers:
            denoiser.watch()
        self.others.append(method)
        return method

    def used(self, method: Method, generation: Any) -> None:
        """A run begins with this one of the others; those that none has had for longest go."""
        method.runs.add(generation)
        self.others.remove(method)
        self.others.append(method)
        idle = [other for other in self.others if not other.runs]
        for other in idle[: max(len(idle) - KEPT, 0)]:
            self._end(other)
        self._tidy()

    def hook(self) -> None:
        """Have the targets of the cache's own recipe stand in the models."""
        for switch in self.switches:
            switch.hook(switch.own)

    def remove(self) -> None:
        """Take the cache's own recipe off the models; the others stay for runs that have them."""
        self.hook()
        own, self.own = self.own, None
        for denoiser in reversed(own.denoisers):
            denoiser.remove()

    def put_back(self, own: Method) -> None:
        """Make this, which was removed, the cache's own recipe again."""
        self.own = own
        for denoiser in own.denoisers:
            denoiser.install()

    def end(self) -> None:
        """Take everything off, for good."""
        if self.own is not None:
            self.remove()
        for other in list(self.others):
            self._end(other)
        self._tidy()

    def _end(self, other: Method) -> None:
        self.others.remove(other)
        for denoiser, switch in zip(other.denoisers, self.switches, strict=True):
            if switch.hooked is denoiser:
                switch.hook(switch.own if self.own else None)
            denoiser.end()

    def _tidy(self) -> None:
        self.pools[:] = [denoiser.pool for denoiser in self]
