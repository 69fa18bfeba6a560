# SPDX-License-Identifier: Apache-2.0
"""fastcache.calibrate: runs with every step computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..cache import Cache, enable
from ..calibration.calibration import Calibration
from ..calibration.collect import collect, measured
from ..calibration.fields import MAX_STEPS
from ..calibration.grams import Grams
from ..checks import whole
from ..configs import MagCacheConfig
from ..made_for import class_of_scheduler
from ..models.adapter import BlockAdapter
from ..runtime.compiling import eagerly
from .first_block import watch_first_blocks
from .input_change import watch_inputs
from .trajectory import watch_trajectories


def calibrate(
    run: Callable[..., Any] | Sequence[Callable[..., Any]],
    target: Any,
    *,
    num_inference_steps: int | None = None,
    contexts: Sequence[str] | None = None,
    model: str | None = None,
    scheduler: str | None = None,
    source: str = "",
    adapter: BlockAdapter | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Calibration:
    """Measure a model or pipeline while `run` generates with it, every step computed.

    The model is as before afterwards, also after an error.

    Args:
        run: a callable that performs one generation. It is called without arguments, or with the cache
            where it takes a required argument or one named `cache` (a hand-written loop opens
            `cache.context`). Several callables, one per prompt or seed, are averaged.
        target: the pipeline or module, as `fastcache.enable` takes it.
        num_inference_steps: denoiser calls expected per context, checked; None: any number.
        contexts: names of contexts to keep; None: all.
        model, scheduler: names to record; None: those of the classes.
        source: where the numbers come from, in words, recorded.
        adapter: as of `fastcache.enable`.
        backend: as of `fastcache.enable`.
        progress: whether to show a progress line.
    Returns:
        Ratios for MagCache, first-block changes, what schedules are planned on (`Calibration.plan`), and where the
        first block's modulation is known what TeaCache's polynomial is fitted to, by context.
    Raises:
        TypeError: `run` is not callable, or another argument of another type.
        CalibrationError: nothing usable was measured; the message says why.
    Source: MagCache (arXiv 2506.09045), calibration of diffusers 0.42.1.
    """
    jobs = [run] if callable(run) else list(run) if isinstance(run, Sequence) else []
    if not jobs or not all(map(callable, jobs)):
        raise TypeError(
            f"calibrate: run is {type(run).__name__}, must be a callable that performs one "
            "generation, or several"
        )
    expected = num_inference_steps
    if expected is not None:
        whole("calibrate", "num_inference_steps", expected, 1, MAX_STEPS)
    cache = enable(target, MagCacheConfig(calibrate=True), adapter=adapter, backend=backend)
    total = None if expected is None else expected * len(jobs)
    guides: dict[str, Grams] = {}
    with (
        cache,
        watch_first_blocks(cache, guides) as watched,
        watch_inputs(cache, guides) as inputs,
        watch_trajectories(cache) as grams,
    ):
        with (
            torch.no_grad(),
            eagerly(True),
            cache.progress(total, desc="calibrate") if progress else nullcontext(),
        ):
            for job in jobs:
                generate_with(job, cache)
                cache.reset()
    names = {
        "model": model or cache.model_names,
        "scheduler": scheduler or class_of_scheduler(target),
    }
    runs = measured(cache.settings.calibrated, cache.denoisers)
    return collect(runs, watched, contexts, expected, inputs, grams, guides, source=source, **names)


def generate_with(job: Callable[..., Any], cache: Cache) -> None:
    """Call a run: with the cache where it takes it, else without arguments."""
    try:
        parameters = inspect.signature(job).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    if "cache" in parameters and parameters["cache"].kind is not inspect.Parameter.POSITIONAL_ONLY:
        job(cache=cache)
    elif any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters.values()
    ):
        job(cache)
    else:
        job()
