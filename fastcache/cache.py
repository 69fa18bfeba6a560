"""The runtime that users hold: enable, context, reset, update, disable; all or nothing."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checks import flag, whole
from .configs import Config
from .configs.resolve import resolve
from .models.adapter import BlockAdapter
from .models.pipeline import denoisers_of
from .models.registry import adapter_for
from .ops import dispatch
from .runtime.compiling import NOTHING, watch_compiling
from .runtime.context import IMPLICIT, Context, innermost
from .runtime.denoiser import Denoiser
from .runtime.patch import MARK
from .runtime.runs import ALL
from .runtime.stats import Stats, known
from .storage.allocate import FP8
from .storage.budget import Budget
from .storage.pool import SPARE
from .storage.state import State

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
        dispatch.check_backend(backend)
        if adapter is not None and not isinstance(adapter, BlockAdapter):
            raise TypeError(
                f"adapter is {type(adapter).__name__}, must be a fastcache.BlockAdapter or None"
            )
        models = denoisers_of(target)
        for name, model in models:
            if MARK in model.__dict__:
                raise ValueError(
                    f"target: {name} is already enabled; call cache.update(config) to change its settings or "
                    "cache.disable() first"
                )
            if getattr(model, "_cache_config", None) is not None:
                raise ValueError(
                    f"target: {name} is already enabled with diffusers' own hooks; call its disable_cache() first"
                )
        if process_group is not None and not isinstance(process_group, _process_groups()):
            raise TypeError(
                f"process_group is {process_group!r}, must be a torch.distributed.ProcessGroup or None"
            )
        self.target, self.backend, self.process_group = target, backend, process_group
        self.adapter, self.cache_dtype = adapter, checked_dtype(cache_dtype)
        self.lock = threading.RLock()  # one call at a time, whichever thread it comes from
        self.budget: Budget | None = None
        if max_bytes is not None:
            limit = whole("enable", "max_bytes", max_bytes, 0)
            self.budget = Budget(limit, flag("enable", "offload", offload), self._warn_once)
        elif offload:
            raise ValueError("enable: offload is True, needs max_bytes, beyond which to offload")
        self.evented = not isinstance(target, nn.Module)  # a pipeline announces the end of its runs
        self.stats = Stats()
        self.denoisers: list[Denoiser] = []
        self._warned: set[str] = set()
        self._unsaid: list[str] = []
        # calibrated runs that ended: ratios, one per part of the stack and step, and the steps
        self._measured: dict[tuple[str, str], list[tuple[list[Tensor], int]]] = {}
        self._models = models
        self._attach(config)

    def _attach(self, config: Any) -> None:
        recipe, own = resolve(config)
        callback = self._callback(own)
        warning = getattr(own, "warning", None)
        denoisers = [
            Denoiser(self, name, model, recipe, self.adapter or adapter_for(model))
            for name, model in self._models
        ]
        try:
            for denoiser in denoisers:
                denoiser.install()
        except BaseException:
            for denoiser in denoisers:
                denoiser.remove()
            raise
        if warning:
            warnings.warn(warning, stacklevel=4)
        self.recipe, self.config, self.timestep_callback = recipe, own, callback
        self.denoisers = denoisers
        if self.budget is not None:
            self.budget.members = [denoiser.slots for denoiser in denoisers]

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

    def expect(self, frame: Context) -> bool:
        """Get every denoiser ready for a compiled call; False where it must run eagerly."""
        watch_compiling()
        ready = True
        for denoiser in self.denoisers:
            ready &= denoiser.expect(frame)
        return ready

    def settle(self, frame: Context, failed: bool) -> None:
        """Account for a context that closes."""
        for denoiser in self.denoisers:
            prepared = denoiser.prepared
            if prepared is not None and prepared.frame is frame:
                denoiser.settle(prepared, failed)
            if failed:
                denoiser.abandon(frame.request)

    def _request(self) -> Any:
        return (innermost(self) or IMPLICIT).request

    def _backend(self) -> contextlib.AbstractContextManager:
        return NOTHING if self.backend == dispatch.AUTO else dispatch.backend(self.backend)

    def reset(self, request: Any = ALL) -> None:
        """Forget the run of one request, or all runs (also with None). Storage is kept for the next."""
        for denoiser in self.denoisers:
            denoiser.reset(ALL if request is None else request)
        self._speak()

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
        self._speak()
        return self

    def disable(self) -> None:
        """Remove everything: the model is as it was before `enable`. Calling it again does nothing."""
        denoisers, self.denoisers = self.denoisers, []
        for denoiser in reversed(denoisers):
            denoiser.remove()
        self._speak()

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
        return sum(d.slots.nbytes() for d in self.denoisers)

    def summary(self) -> str:
        """In words: what is hooked, steps computed and reused and why, bytes held, kernel backend."""
        lines = [
            f"fastcache: {self.recipe.name} on {', '.join(d.name for d in self.denoisers) or 'nothing (disabled)'}"
        ]
        for rule in self.recipe.rules:
            lines.append(f"  when {rule.when}, what {rule.what}, where {type(rule.where).__name__}")
        for name, hooked in self.hooked().items():
            shown = ", ".join(hooked[:4]) + (
                f" and {len(hooked) - 4} more" if len(hooked) > 4 else ""
            )
            lines.append(f"  hooked in {name}: {shown}")
        lines += self.stats.lines()
        device = next(
            (str(p.device.type) for d in self.denoisers for p in d.model.parameters()), "cpu"
        )
        backend = self.backend if self.backend != dispatch.AUTO else dispatch.active(device)
        lines.append(f"cache holds {self.nbytes() / 2**20:.2f} MiB; kernels: {backend}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<fastcache.Cache {self.recipe.name} on {[d.name for d in self.denoisers]}, {self.stats!r}>"

    def plot(self, path: Any) -> Any:
        """Draw signal against threshold and the decisions per step into a picture at `path`."""
        from .reporting.plots import plot_run

        held: dict[str, int] = {}
        for denoiser in self.denoisers:
            for name, size in denoiser.slots.held().items():
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
        for key, finished in self._measured.items():
            yield from ((key, measured, count) for measured, count in finished)
        for denoiser in self.denoisers:
            for state in denoiser.slots.states.values():
                if state.index and state.measured:
                    yield (denoiser.name, state.key[1]), state.measured, state.timelines[0].pushes

    @property
    def model_names(self) -> str:
        """The classes of the denoisers."""
        return ", ".join(dict.fromkeys(type(model).__name__ for _, model in self._models))

    def progress(
        self, total: int | None = None, **options: Any
    ) -> contextlib.AbstractContextManager:
        """A progress line of denoiser calls and how many of them were reused; see `fastcache.progress`."""
        from .reporting.progress import progress

        return progress(self, total, **options)

    def _run_ended(self, denoiser: Denoiser, state: State) -> None:
        """Once per finished run and context: keep what was calibrated, or say that the cache did nothing."""
        if not state.index:
            return
        if state.measured:
            key = (denoiser.name, state.key[1])
            self._measured.setdefault(key, []).append((state.measured, state.timelines[0].pushes))
            return
        from .runtime.verdict import verdict

        kind, message = verdict(known(state.records), denoiser.recipe)
        if message:
            self._tell(kind, message)

    def _tell(self, kind: str, message: str) -> None:
        """Have a warning of this kind given once, at the next time that nothing is under way."""
        if kind not in self._warned:
            self._warned.add(kind)
            self._unsaid.append(f"fastcache: {message}")

    def _speak(self) -> None:
        """Give the warnings that wait, now that an error made of one would break nothing."""
        while self._unsaid:
            warnings.warn(self._unsaid.pop(), stacklevel=3)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


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


KEPT_IN = (torch.float32, torch.float16, torch.bfloat16, FP8)


def checked_dtype(value: Any) -> torch.dtype | None:
    """`cache_dtype`, checked."""
    if value is not None and value not in KEPT_IN:
        kind = ValueError if isinstance(value, torch.dtype) else TypeError
        raise kind(
            f"cache_dtype is {value!r}, must be None or one of {', '.join(map(str, KEPT_IN))}"
        )
    return value


def _process_groups() -> tuple[type, ...]:
    """The class of process groups, where this torch has one."""
    group = getattr(torch.distributed, "ProcessGroup", None)
    return () if group is None else (group,)
