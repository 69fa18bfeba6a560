# SPDX-License-Identifier: Apache-2.0
"""What an engine with its own loop attaches to: a cache on its denoisers, driven by the engine's events.

    attached = Attached(engine.transformer, "balanced")
    with attached.run(num_inference_steps=28):                # one generation
        for i, t in enumerate(timesteps):
            with attached.call("cond", step_index=i):         # one call of a denoiser
                engine.transformer(...)
    attached.statistics()
    attached.close()

Engines that say where a generation begins and nothing else have `announce`; those that keep many in flight, `slot`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..cache import enable
from ..models.pipeline import DENOISERS
from ..runtime.generation import Generation
from .engine import Swaps


class Denoisers:
    """Models of an engine under the names that a pipeline has for them, in the order in which they run."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        vars(self).update(zip(DENOISERS, modules, strict=False))


class Slot:
    """One generation of several that take turns: whoever calls a denoiser while it is open is in it.

    Args:
        attached: on whose denoisers.
        num_inference_steps: steps of the generation, a count; None where it is not known.
        recipe: of the generations in this slot, anything that `enable` takes; None: that of the cache.
    """

    def __init__(
        self, attached: Attached, num_inference_steps: int | None = None, recipe: Any = None
    ) -> None:
        self.attached, self.open, self.recipe = attached, False, recipe
        self.begin(num_inference_steps)

    def begin(self, num_inference_steps: int | None = None) -> None:
        """A generation begins in this slot; what the last one left is forgotten."""
        self.num_inference_steps = num_inference_steps
        self.generation: Generation = self.attached.run(num_inference_steps, recipe=self.recipe)

    def resume(self) -> None:
        """The calls that follow are this generation's. Doing it again does nothing."""
        if not self.open:
            self.generation.resume()
            self.open = True

    def pause(self) -> None:
        """The calls that follow are not. Doing it again does nothing."""
        if self.open:
            self.generation.pause()
            self.open = False

    def clear(self, failed: bool = False) -> None:
        """The generation is over: its storage serves the next ones.

        Args:
            failed: whether an exception has ended it, as a bool.
        """
        self.pause()
        self.attached.cache.ended(self.generation, failed)

    def nbytes(self) -> int:
        """Bytes of cached tensors that this generation holds."""
        return sum(
            state.nbytes()
            for pool in self.attached.cache.methods.pools
            for key, state in pool.states.items()
            if key[0] == self.generation.request
        )


class Attached:
    """A cache on the denoisers of an engine.

    Args:
        denoisers: an nn.Module, or up to four in the order in which they run. Whether their blocks are compiled
            already does not matter.
        config: as for `fastcache.enable`: a config, a Recipe, a preset's name or the path of a recipe file.
        options: the other arguments of `fastcache.enable`: adapter, backend, process_group, max_bytes, cache_dtype,
            offload.
    Raises:
        TypeError, ValueError: that names the argument; the models are left as they were.
    """

    def __init__(
        self, denoisers: nn.Module | Sequence[nn.Module], config: Any, **options: Any
    ) -> None:
        modules = [denoisers] if isinstance(denoisers, nn.Module) else list(denoisers)
        if not 1 <= len(modules) <= len(DENOISERS):
            raise ValueError(
                f"denoisers: {len(modules)} were given, must be 1 to {len(DENOISERS)} modules"
            )
        target: Any = modules[0] if len(modules) == 1 else Denoisers(modules)
        self.cache = enable(target, config, **options)
        self.swaps = Swaps()
        self.steps: int | None = None  # of the next generation that `announce` sees

    def run(
        self, num_inference_steps: int | None = None, request: Any = None, recipe: Any = None
    ) -> Any:
        """Around one generation, from its first step to its last; see `Cache.run`.

        Args:
            num_inference_steps: steps of the generation, a count; None where it is not known.
            request: any hashable, whose calls these are; None makes one that nobody else has.
            recipe: of this generation alone, anything that `enable` takes; None: that of the cache.
        Returns:
            A context manager.
        """
        return self.cache.run(request, num_inference_steps=num_inference_steps, recipe=recipe)

    def call(self, branch: str = "default", **facts: Any) -> AbstractContextManager[None]:
        """Around one call of a denoiser, where the engine knows which it is; see `Cache.context`.

        Args:
            branch: of guidance, a window or a tile, by name.
            facts: request, step_index, num_inference_steps, timestep, sigma, compute.
        Returns:
            A context manager.
        """
        return self.cache.context(branch, **facts)

    def announce(self, owner: Any, name: str) -> None:
        """Have every call of a method be one generation, until `close`.

        Args:
            owner: the object whose method it is.
            name: of the method that runs a whole generation.
        """
        original = getattr(owner, name)

        @functools.wraps(original)
        def generation(*args: Any, **kwargs: Any) -> Any:
            steps, self.steps = self.steps, None
            with self.run(steps):
                return original(*args, **kwargs)

        self.swaps.put(owner, name, generation)

    def refresh(self, num_inference_steps: int | None = None, config: Any = None) -> None:
        """What ran is forgotten, and the next generation that `announce` sees has so many steps.

        Args:
            num_inference_steps: a count; None where it is not known.
            config: what takes the place of the config; None leaves it as it is.
        Raises:
            TypeError, ValueError: that names what is wrong with the config; the old one stays.
        """
        if config is None or config in (self.cache.config, self.cache.recipe):
            self.cache.reset()
        else:
            self.cache.update(config)
        self.steps = num_inference_steps

    def slot(self, num_inference_steps: int | None = None, recipe: Any = None) -> Slot:
        """One generation of several in flight.

        Args:
            num_inference_steps: its steps, a count; None where it is not known.
            recipe: of this one alone, anything that `enable` takes; None: that of the cache.
        Returns:
            A Slot, which is not open yet.
        """
        return Slot(self, num_inference_steps, recipe)

    def statistics(self) -> dict[str, int]:
        """How many calls were computed and reused, and the bytes of cached tensors now."""
        stats = self.cache.stats
        return {
            "computed": stats.computed,
            "reused": stats.reused,
            "bytes": self.cache.nbytes(),
        }

    def close(self) -> None:
        """Everything is as it was before. Doing it again does nothing."""
        self.swaps.undo()
        self.cache.disable()
