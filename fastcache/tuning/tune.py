# SPDX-License-Identifier: Apache-2.0
"""fastcache.tune: the best recipe for a model, found on that model."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..checks import flag, real, whole
from ..made_for import MadeFor, class_of_scheduler
from ..recipe import Recipe
from ..reporting.progress import work
from .budget import budget
from .generation import Generation
from .goal import Goal
from .journal import Journal
from .lab import Lab, OutOfTime, Trial
from .result import Tuning
from .rows import Row
from .search import Search
from .words import doubts, verdict

MOST_STEPS = 1000  # of a run: what most schedulers were trained with
REFERENCE = 8  # times as many steps as the longest run that is tried, in the converged reference
FEWEST = 200  # and at least so many
ANY = (1.0, 0.5, 0.72, 1.36, 1.8)  # "any" step counts, as shares of the usual one

Steps = int | Sequence[int] | Literal["any"]


def tune(
    generate: Callable[..., Any],
    target: Any,
    *,
    speedup: float | None = None,
    error: float | None = None,
    steps: Steps = 28,
    reference: Literal["uncached", "converged"] = "uncached",
    seeds: Sequence[int] = (0, 1),
    minutes: float | None = None,
    progress: bool = True,
    journal: str | Path | None = None,
) -> Tuning:
    """Find the recipe, and the number of steps, that serve a model best, by whole runs of a generation of yours.

    Every candidate is compared with the same run without a cache at other step counts, and by its measured time.
    The target is as before afterwards, also after an error or an interrupt.

    Args:
        generate: one generation with `target`; called with those of `cache`, `num_inference_steps` and `seed` that
            it declares, and returns a tensor, an array, a PIL image, or a list of them. It draws its noise from `seed`.
        target: the pipeline or module, as `fastcache.enable` takes it, not enabled.
        speedup: of the usual run's measured time, >= 1: the nearest run at that speed is looked for.
        error: PSNR in dB to the reference: the fastest run that keeps it is looked for.
        steps: `num_inference_steps`: a number, several of which the first is the usual one, or "any": the usual
            one is then the default that `generate` declares, else 28, and others from half to twice as many are tried.
        reference: "uncached", the usual run without a cache, or "converged", a run without one of many steps: 8
            times the largest number that is tried, at least 200, at most 1000.
        seeds: whole numbers; all candidates run with the first, the better ones with the others.
        minutes: time limit; what was best until then is the result. None: none.
        progress: whether to show a progress line, where tqdm is installed.
        journal: a file that keeps what was measured, so that an interrupted tuning goes on where it was; None: none.
    Returns:
        The best recipe, all that was tried, and what it was measured on.
    Raises:
        TypeError, ValueError: that names the argument; so does a run of `generate` that gives no picture or does not
            repeat, and a target that no recipe fits.
    Source: ours; successive halving after Jamieson and Talwalkar (arXiv 1502.07943).
    """
    goal = Goal(speedup, error)
    generation = Generation(generate, target)
    counts = _counts(steps, generation)
    if reference not in ("uncached", "converged"):
        raise ValueError(f"tune: reference is {reference!r}, must be 'uncached' or 'converged'")
    many = counts[0]
    if reference == "converged":
        if "num_inference_steps" not in generation.takes:
            raise ValueError(
                "tune: reference is 'converged', which needs a generate that declares num_inference_steps"
            )
        many = max(min(max(REFERENCE * max(counts), FEWEST), MOST_STEPS), *counts)
    tried = _seeds(seeds, generation)
    limit = None if minutes is None else 60 * real("tune", "minutes", minutes, 0.0)
    flag("tune", "progress", progress)
    versions = {
        "fastcache": importlib.metadata.version("fastcache-dit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    settings = {
        "goal": str(goal), "steps": list(counts), "reference": reference, "seeds": list(tried),
        "model": generation.model_name, "scheduler": class_of_scheduler(target), "dtype": generation.dtype,
        "device": generation.device.type, "versions": versions,
    }  # fmt: skip
    kept = Journal(None if journal is None else Path(journal), settings)
    references = many / counts[0] * (len(tried) + 0.5) if reference == "converged" else 0.0
    expected = budget(counts, reference == "converged") + references
    with work(expected, "tune", progress) as tick:
        lab = Lab(generation, counts[0], many, tried, kept, limit, tick)
        search = Search(lab, goal, counts)
        try:
            search.run()
            complete = True
        except OutOfTime:
            complete = False
    _refuse_nothing(lab)
    return _result(search, settings, complete)


def _counts(steps: Any, generation: Generation) -> tuple[int, ...]:
    """The step counts to try, the usual one first."""
    declares = "num_inference_steps" in generation.takes
    if isinstance(steps, str):
        if steps != "any":
            raise ValueError(
                f"tune: steps is {steps!r}, must be a number, a sequence of numbers or 'any'"
            )
        usual = generation.default_steps or 28
        found = (
            [usual, *(max(round(share * usual), 2) for share in ANY[1:])] if declares else [usual]
        )
    elif isinstance(steps, Sequence):
        found = list(steps)
    else:
        found = [steps]
    counts = tuple(dict.fromkeys(whole("tune", "steps", n, 2, MOST_STEPS) for n in found))
    if not counts:
        raise ValueError("tune: steps is empty, must hold at least one number")
    if len(counts) > 1 and not declares:
        raise ValueError(
            f"tune: steps is {steps!r}, but generate does not declare num_inference_steps; declare it, or give one "
            "number"
        )
    return counts


def _seeds(seeds: object, generation: Generation) -> tuple[int, ...]:
    if isinstance(seeds, str) or not isinstance(seeds, Sequence | range):
        raise TypeError(f"tune: seeds is {seeds!r}, must be a sequence of whole numbers")
    found = tuple(dict.fromkeys(whole("tune", "seeds", seed, 0) for seed in seeds))
    if not found:
        raise ValueError("tune: seeds is empty, must hold at least one whole number")
    return found if "seed" in generation.takes else found[:1]


def _refuse_nothing(lab: Lab) -> None:
    """Raise where every recipe failed: that is a fault of the generation or its target, and not of the recipes."""
    cached = [t for t in lab.trials.values() if t.candidate.recipe is not None]
    failed = [t for t in cached if t.error]
    if failed and len(failed) == len(cached):
        raise ValueError(f"tune: no recipe could be run; the last one said: {failed[-1].error}")


def _result(search: Search, settings: dict[str, Any], complete: bool) -> Tuning:
    lab, best = search.lab, search.best()
    trials = sorted(search.trials(), key=lambda t: t is not best)
    rows = tuple(_row(lab, t) for t in trials if t.quality > -math.inf)
    chosen = rows[0] if rows else None
    steps = search.counts[0] if chosen is None else chosen.steps
    taken = lab.taken(steps) if chosen is not None and len(lab.generation.models) == 1 else 0
    evidence = {
        **settings,
        "size": lab.size,
        "steps_of_the_denoiser": taken,
        "reference_steps": lab.many,
        "seconds_of_the_uncached_run": lab.seconds,
        "seconds_of_the_tuning": round(lab.elapsed, 1),
        "runs": sum(len(t.ratios) for t in trials),
        "complete": complete,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    met = best is not None and search.goal.met(lab, best)
    said = verdict(rows, search.counts[0], met, complete) + doubts(
        chosen, search.converges, lab.repeats
    )
    recipe = None
    if chosen is not None and chosen.recipe is not None:
        made_for = MadeFor(settings["model"], settings["scheduler"], taken)
        recipe = Recipe.of(chosen.recipe.rules, chosen.name, made_for)
    reference = "the uncached run" if lab.many == lab.usual else f"{lab.many} steps without a cache"
    wish = f"{search.goal}, {settings['model']}, {', '.join(map(str, search.counts))} steps; PSNR to {reference}"
    return Tuning(recipe, steps, rows, wish, said, evidence)


def _row(lab: Lab, trial: Trial) -> Row:
    ratio = max(lab.expected(trial), 1e-9)
    name, steps = trial.candidate.name, trial.candidate.steps
    tried = trial.candidate.recipe
    recipe = None if tried is None else Recipe.of(tried.rules, name)
    seconds, seeds = ratio * lab.seconds, tuple(trial.psnr)
    return Row(name, recipe, steps, trial.computed, seconds, 1 / ratio, trial.quality, seeds)
