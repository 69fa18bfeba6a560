"""The runtime that users hold: enable, context, reset, update, disable; all or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checks import flag, whole
from .configs import Config
from .configs.resolve import resolve
from .models.adapter import BlockAdapter
from .models.pipeline import denoisers_of
from .models.registry import adapter_for
from .ops import dispatch
from .reporting.summary import summarise
from .runtime.compiling import watch_compiling
from .runtime.context import Context
from .runtime.denoiser import Denoiser
from .runtime.notices import LOG, warn
from .runtime.patch import ATTACHED
from .runtime.runs import ALL, abandon
from .runtime.settings import Settings
from .storage.budget import Budget
from .storage.pool import SPARE, Slots

if TYPE_CHECKING:
    from .calibration.calibration import Calibration
    from .calibration.collect import Measured


class Cache:
    """A cache attached to one model or to every denoiser of a pipeline; made by `fastcache.enable`."""

    def __init__(
        self,
        target: Any,
        config: Any,
        adapter: BlockAdapter | None,
        backend: str,
        process_group: Any,
        max_bytes: int | None,
        cache_dtype: torch.dtype | None,
        offload: bool,
    ) -> None:
        if adapter is not None and not isinstance(adapter, BlockAdapter):
            raise TypeError(
                f"adapter is {type(adapter).__name__}, must be a fastcache.BlockAdapter or None"
            )
        models = denoisers_of(target)
        for name, model in models:
            if ATTACHED in model.__dict__:
                raise ValueError(
                    f"target: {name} is already enabled; call cache.update(config) to change its settings or "
                    "cache.disable() first"
                )
            if getattr(model, "_cache_config", None) is not None:
                raise ValueError(
                    f"target: {name} is already enabled with diffusers' own hooks; call its disable_cache() first"
                )
        pools: list[Slots] = []
        budget: Budget | None = None
        if max_bytes is not None:
            limit = whole("enable", "max_bytes", max_bytes, 0)
            budget = Budget(limit, flag("enable", "offload", offload), pools)
        elif offload:
            raise ValueError("enable: offload is True, needs max_bytes, beyond which to offload")
        self.target, self.adapter, self.models = target, adapter, models
        self.settings = Settings(
            backend=backend,
            process_group=process_group,
            cache_dtype=cache_dtype,
            budget=budget,
            pipeline_ends_runs=not isinstance(target, nn.Module),
            pools=pools,
        )
        self.lock, self.stats = self.settings.lock, self.settings.stats
        self.denoisers: list[Denoiser] = []
        self._attach(config)

    def _attach(self, config: Any) -> None:
        recipe, own = resolve(config)
        settings = replace(self.settings, timestep_callback=self._callback(own))
        warning = getattr(own, "warning", None)
        denoisers = [
            Denoiser(self, settings, name, model, recipe, self.adapter or adapter_for(model))
            for name, model in self.models
        ]
        try:
            for denoiser in denoisers:
                denoiser.install()
        except BaseException:
            for denoiser in denoisers:
                denoiser.remove()
            raise
        self.recipe, self.config = recipe, own
        self.settings, self.denoisers = settings, denoisers
        settings.pools[:] = [denoiser.pool for denoiser in denoisers]
        LOG.debug("%s attached to %s", recipe.name, [denoiser.name for denoiser in denoisers])
        if warning:
            warn(warning)

    def _callback(self, own: Config | None) -> Callable[[], Any] | None:
        callback = own.timestep_callback if own is not None else None
        if callback is None and own is not None and hasattr(own, "current_timestep_callback"):
            if not hasattr(type(self.target), "current_timestep"):
                raise ValueError(
                    f"{type(own).__name__}: current_timestep_callback is None; pass a function that returns the "
                    "running timestep, such as lambda: pipe.current_timestep"
                )
            pipe = self.target
            return lambda: pipe.current_timestep
        return callback

    # --- driving ------------------------------------------------------------------------------------------

    def context(
        self,
        name: str = "default",
        *,
        request: Any = 0,
        step_index: int | None = None,
        num_inference_steps: int | None = None,
        timestep: Any = None,
        sigma: Any = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Around one denoiser call: whose state it uses, and which step it is.

        name: the branch, such as "cond" and "uncond". request: any hashable. step_index: from 0; where it
        is left out, calls are counted per (request, name). timestep, sigma: of this step, in the model's
        scale. Contexts nest; the outer one is restored. An exception inside forgets the request's runs.
        Raises TypeError or ValueError that names the argument.
        """
        return Context(self, name, request, step_index, num_inference_steps, timestep, sigma)

    def prepare(self, frame: Context) -> bool:
        """Get every denoiser ready for a compiled call; False where it must run eagerly."""
        watch_compiling()
        ready = True
        for denoiser in self.denoisers:
            ready &= denoiser.ahead.prepare(frame)
        return ready

    def commit_prepared(self, frame: Context, failed: bool) -> None:
        """Account for a context that closes."""
        for denoiser in self.denoisers:
            if denoiser.ahead.prepared is not None:
                denoiser.ahead.commit_prepared(frame, failed)
        if failed:
            with self.lock:
                abandon(self.settings.pools, frame.request)

    def reset(self, request: Any = ALL) -> None:
        """Forget the run of one request, or all runs (also with None). Storage is kept for the next."""
        for denoiser in self.denoisers:
            denoiser.forget(ALL if request is None else request)
        self.settings.notices.emit()

    def update(self, config: Any) -> Cache:
        """Change the settings. Runs begin anew; where the new ones do not fit, the old ones stay."""
        before = self.denoisers
        if not before:
            raise ValueError("config: this cache is disabled; call fastcache.enable again")
        for denoiser in before:
            denoiser.remove()
        try:
            self._attach(config)
        except BaseException:
            for denoiser in before:
                denoiser.install()
            raise
        self.settings.notices.emit()
        return self

    def disable(self) -> None:
        """Remove everything: the model is as it was before `enable`. Calling it again does nothing."""
        denoisers, self.denoisers = self.denoisers, []
        for denoiser in reversed(denoisers):
            denoiser.remove()
        self.settings.pools.clear()
        LOG.debug("disabled")
        self.settings.notices.emit()

    @property
    def enabled(self) -> bool:
        return bool(self.denoisers)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    # --- telling ------------------------------------------------------------------------------------------

    def hooked(self) -> dict[str, list[str]]:
        """What is hooked, per denoiser."""
        return {d.name: [name for t in d.targets for name in t.hooked()] for d in self.denoisers}

    def nbytes(self) -> int:
        """Bytes of cached tensors."""
        return sum(d.pool.nbytes() for d in self.denoisers)

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

    def plot(self, path: Any) -> Any:
        """Draw signal against threshold and the decisions per step into a picture at `path`."""
        from .reporting.plots import plot_run

        held: dict[str, int] = {}
        for denoiser in self.denoisers:
            for name, size in denoiser.pool.held().items():
                if len(self.denoisers) > 1 and name != SPARE:
                    name = f"{denoiser.name} {name}"
                held[name] = held.get(name, 0) + size
        return plot_run(self.stats, self.recipe, held, path)

    @property
    def calibration(self) -> Calibration:
        """What `MagCacheConfig(calibrate=True)` has measured so far, as an object keyed by context.

        Raises CalibrationError, a ValueError, where nothing was measured.
        """
        from .calibration.collect import collect

        return collect(self.measured(), model=self.model_names)

    def measured(self) -> Iterator[Measured]:
        """What calibrating runs have measured, those that are over and those that still go on."""
        for key, finished in self.settings.calibrated.items():
            yield from ((key, measured, count) for measured, count in finished)
        for denoiser in self.denoisers:
            for state in denoiser.pool.states.values():
                if state.index and state.measured:
                    yield (denoiser.name, state.key[1]), state.measured, state.timelines[0].pushes

    @property
    def model_names(self) -> str:
        """The classes of the denoisers."""
        return ", ".join(dict.fromkeys(type(model).__name__ for _, model in self.models))

    def progress(
        self, total: int | None = None, **options: Any
    ) -> contextlib.AbstractContextManager:
        """A progress line of denoiser calls and how many of them were reused; see `fastcache.progress`."""
        from .reporting.progress import progress

        return progress(self, total, **options)


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
) -> Cache:
    """Attach a cache to a diffusers pipeline (all its denoisers) or to any nn.Module.

    config: one of the five configs, fastcache's or diffusers' own, which is copied, or a Recipe.
    adapter: how to find and drive the blocks of a model fastcache does not know. backend: kernels to use,
    see `fastcache.backends()`. process_group: ranks that share a sample; decisions taken from data are
    agreed over it, and errors surface within its timeout. max_bytes: what cached tensors may take after a
    call; beyond it the run used least recently goes on without a cache until there is room again, or with
    offload=True waits in host memory for its next call (not in compiled models, whose storage stays in place).
    cache_dtype: what floating values are kept in, torch.bfloat16, torch.float16 or torch.float8_e4m3fn (with
    one scale per token); None keeps them as they are.
    All or nothing: if anything fails the model is untouched.
    Raises TypeError or ValueError that names the argument and says what was looked for.
    """
    return Cache(target, config, adapter, backend, process_group, max_bytes, cache_dtype, offload)
