# SPDX-License-Identifier: Apache-2.0
"""The runtime that users hold: enable, context, reset, update, disable; all or nothing."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checks import whole
from .configs.given import settings_of
from .configs.resolve import callback_of
from .made_for import class_of_scheduler
from .models.adapter import BlockAdapter
from .models.pipeline import denoisers_of
from .recipe import Recipe
from .reporting.telling import Telling
from .runtime.announce import Announcer
from .runtime.called import Called
from .runtime.context import Context, check_request
from .runtime.denoiser import Denoiser
from .runtime.frames import OWN
from .runtime.generation import Generation, fresh
from .runtime.methods import Method, Methods
from .runtime.notices import LOG, warn
from .runtime.patch import refuse_enabled
from .runtime.settings import Settings
from .runtime.trips import ALL
from .storage.budget import budget_of
from .storage.pool import Slots

if TYPE_CHECKING:
    from .calibration.calibration import Calibration


class Cache(Telling, Called):
    """A cache attached to one model or to every denoiser of a pipeline; made by `fastcache.enable`.

    As a context manager it is disabled where the block ends. One call runs at a time, whichever thread it comes from.

    Args:
        target, config, adapter, max_bytes, offload: as for `enable`.
        shared: its other arguments, which all denoisers share.

    Raises:
        TypeError, ValueError: that names the argument; the model is left as it was.
    """

    def __init__(
        self,
        target: Any,
        config: Any,
        adapter: BlockAdapter | None,
        max_bytes: int | None,
        offload: bool,
        **shared: Any,
    ) -> None:
        if adapter is not None and not isinstance(adapter, BlockAdapter):
            raise TypeError(
                f"adapter is {type(adapter).__name__}, must be a fastcache.BlockAdapter or None"
            )
        models = denoisers_of(target)
        refuse_enabled(models)
        pools: list[Slots] = []
        budget = budget_of(max_bytes, offload, pools)
        self.target, self.adapter, self.models = target, adapter, models
        self.settings = Settings(budget=budget, **shared)
        self.lock, self.stats = self.settings.lock, self.settings.stats
        self.methods = Methods(self, models, adapter, pools)
        self.denoisers: list[Denoiser] = []
        self.announcer = None if isinstance(target, nn.Module) else Announcer(target, self)
        self._attach(config)
        if self.announcer is not None:
            self.announcer.put_on()

    def _attach(self, config: Any) -> None:
        recipe, own = settings_of(config)
        method = self.methods.attach(self._settings_with(own), recipe, own)
        self.recipe, self.config = recipe, own
        self.settings, self.denoisers = method.settings, method.denoisers
        self._welcome(recipe, own)

    def _settings_with(self, own: Any) -> Settings:
        """What denoisers share, the running timestep being told as a config wants it."""
        return replace(self.settings, timestep_callback=callback_of(own, self.target))

    def _welcome(self, recipe: Recipe, own: Any) -> None:
        """Say what there is to say of a recipe that is new here."""
        LOG.debug("%s attached to %s", recipe.name, [denoiser.name for denoiser in self.denoisers])
        if warning := getattr(own, "warning", None):
            warn(warning)
        given = {"model": self.model_names, "scheduler": class_of_scheduler(self.target)}
        for differing in recipe.made_for.differs(**given) if recipe.made_for else ():
            warn(f"fastcache: the recipe was made for {differing}; tune or plan one on this")

    # --- driving ------------------------------------------------------------------------------------------

    def context(
        self,
        name: str = "default",
        *,
        request: Any = OWN,
        step_index: int | None = None,
        num_inference_steps: int | None = None,
        timestep: Any = None,
        sigma: Any = None,
        compute: bool = False,
    ) -> contextlib.AbstractContextManager[None]:
        """Around one denoiser call: whose state it uses, and which step it is. Contexts nest.

        Args:
            name: the branch, such as "cond" and "uncond".
            request: any hashable. Left out, it is that of the context or run around, else the thread's own:
                0 in the main thread.
            step_index: number of the step, from 0; left out, calls are counted per (request, name).
            num_inference_steps: steps of the run, a count.
            timestep, sigma: of this step, numbers in the model's scale.
            compute: True has the call run in full, whatever the policy says.
        Returns:
            A context manager. An exception inside forgets the runs of the request.
        Raises:
            TypeError, ValueError: that names the argument.
        """
        return Context(
            self, name, request, step_index, num_inference_steps, timestep, sigma, compute
        )

    def run(
        self, request: Any = None, *, num_inference_steps: int | None = None, recipe: Any = None
    ) -> contextlib.AbstractContextManager[Any]:
        """Around one generation, all of its steps: a run begins where it does, and is forgotten at its end.

        Args:
            request: any hashable, whose calls these are; None makes one that nobody else has.
            num_inference_steps: steps of the run, a count; None where it is not known.
            recipe: of this run alone: anything that `enable` takes, so also "off", which computes every step.
                None: that of the run around, else the cache's own.
        Returns:
            A context manager; contexts inside name the branches where there are several.
        Raises:
            TypeError, ValueError: that names the argument; nothing has begun.
        """
        if request is None:
            request = fresh()
        check_request("run", request)
        if num_inference_steps is not None:
            num_inference_steps = whole("run", "num_inference_steps", num_inference_steps, 1)
        if recipe is None:
            return Generation(self, request, num_inference_steps)
        with self.lock:
            method = self._method(recipe)
            generation = Generation(self, request, num_inference_steps, method=method)
            if method is not None:
                self.methods.used(method, generation)
        return generation

    def _method(self, what: Any) -> Method | None:
        """A recipe of runs, bound to the models; None where it is the cache's own."""
        if not self.enabled:
            raise ValueError("recipe: this cache is disabled; call fastcache.enable again")
        recipe, own = settings_of(what, "recipe")
        found = self.methods.find(recipe, own)
        if found is None:
            found = self.methods.add(self._settings_with(own), recipe, own)
            self._welcome(recipe, own)
        return None if found is self.methods.own else found

    def reset(self, request: Any = ALL) -> None:
        """Forget the run of one request, or all runs. Storage is kept for the next.

        Args:
            request: the hashable that contexts or `run` were given; left out or None, every request.
        """
        for denoiser in list(self.methods):
            denoiser.forget(ALL if request is None else request)
        self.settings.notices.emit()

    def update(self, config: Any) -> Cache:
        """Change the method. Runs begin anew; where the new settings do not fit, the old ones stay.

        Runs with a recipe of their own go on.

        Args:
            config: anything that `enable` takes.
        Returns:
            This cache.
        Raises:
            TypeError, ValueError: that names the field, or says that this cache is disabled.
        """
        if not self.enabled:
            raise ValueError("config: this cache is disabled; call fastcache.enable again")
        before = self.methods.own
        self.methods.remove()
        try:
            self._attach(config)
        except BaseException:
            self.methods.put_back(before)
            raise
        self.settings.notices.emit()
        return self

    def disable(self) -> None:
        """Remove everything: the model is as it was before `enable`. Calling it again does nothing."""
        if self.announcer is not None:
            self.announcer.take_off()
        self.denoisers = []
        self.methods.end()
        self.settings.pools.clear()
        LOG.debug("disabled")
        self.settings.notices.emit()

    @property
    def enabled(self) -> bool:
        """Whether it is attached, as a bool: True until `disable`."""
        return bool(self.denoisers)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    @property
    def calibration(self) -> Calibration:
        """What `MagCacheConfig(calibrate=True)` has measured so far, as an object keyed by context.

        Raises:
            CalibrationError: a ValueError; nothing was measured.
        """
        from .calibration.collect import collect, measured

        return collect(measured(self.settings.calibrated, self.denoisers), model=self.model_names)


def enable(
    target: Any,
    config: Any,
    *,
    adapter: BlockAdapter | None = None,
    backend: str = "auto",
    process_group: Any = None,
    max_bytes: int | None = None,
    cache_dtype: torch.dtype | None = None,
    offload: bool = False,
    ranks: str = "sum",
) -> Cache:
    """Attach a cache to a diffusers pipeline (all its denoisers) or to any nn.Module.

    All or nothing: if anything fails the model is untouched.

    Args:
        target: the pipeline or the nn.Module; blocks are found by usual names of their list, or by `adapter`.
        config: a config, fastcache's or diffusers' own, which is copied, a Recipe, a preset's
            name (see `fastcache.presets`), "off", or the path of a recipe file, a str or Path that ends in .json.
        adapter: a BlockAdapter, how to find and drive the blocks of a model fastcache does not know.
        backend: kernels to use, "auto" or a name in `fastcache.backends()` that works here.
        process_group: the torch.distributed.ProcessGroup of ranks that share a sample; decisions taken from data
            are agreed over it, and errors surface within its timeout.
        max_bytes: bytes that cached tensors may take after a call, a count; None is no limit. Beyond it the
            run used least recently goes on without a cache until there is room again.
        cache_dtype: what floating values are kept in, torch.float32, torch.bfloat16, torch.float16 or
            torch.float8_e4m3fn (with one scale per token); None keeps them as they are.
        offload: True has such a run wait in host memory for its next call instead, but in compiled models.
        ranks: of `process_group`: "sum" decides by the numbers of all of them, "first" by the first one's.

    Returns:
        The Cache.

    Raises:
        TypeError, ValueError: that names the argument and says what was looked for.
    """
    shared = {
        "backend": backend,
        "process_group": process_group,
        "ranks": ranks,
        "cache_dtype": cache_dtype,
    }
    return Cache(target, config, adapter, max_bytes, offload, **shared)
