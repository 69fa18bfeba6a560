# SPDX-License-Identifier: Apache-2.0
"""What a finished run says about its cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..policies import REUSE
from ..recipe import Recipe
from .gradients import ASKED_FOR
from .stats import Record

JUDGED = 4  # shorter runs are not judged


GUARDS = (
    "first step",
    "warm-up",
    "retention",
    "last step",
    "no residual yet",
    "nothing to compare with",
)


def verdict(records: Sequence[Record], recipe: Recipe) -> tuple[str, str]:
    """What is wrong with a finished run, as (kind, message); empty strings where nothing is.

    Wrong is: no step was reused although the settings meant to, or a rule that weighs every step
    reused each one that it was free to choose.
    """
    if len(records) < JUDGED or all(rule.when.never_reuses for rule in recipe.rules):
        return "", ""
    where = f"context {records[0].context!r} of {records[0].model}"
    if not any(r.action == REUSE for r in records):
        reason = _why_nothing(records, recipe)
        return "nothing", f"no step of {len(records)} was reused in {where}: {reason}"
    when = recipe.rules[0].when
    free = [r for r in records if r.reason not in GUARDS]
    if not when.weighs or len(free) < JUDGED:
        return "", ""
    if all(r.action == REUSE for r in free):
        return "everything", (
            f"each of the {len(free)} steps after warm-up was reused in {where}: the threshold "
            f"{when.threshold:g} was never reached (largest {max(map(_signal, free)):.3g}), so the "
            "result hangs on the first steps alone; lower it, or give the policy max_skips"
        )
    return "", ""


def other_length(steps: int, recipe: Recipe) -> str:
    """What there is to say of a run of so many steps with a recipe that was made for another number; "" for nothing."""
    made_for = recipe.made_for
    if made_for is None or not (differing := made_for.differs(steps=steps)):
        return ""
    return (
        f"the recipe was made for {differing[0]}: what it computes there says little of what is best here; tune or "
        "plan one for this number of steps"
    )


def _signal(record: Record) -> float:
    return record.signal if record.signal is not None else math.nan


def _why_nothing(records: Sequence[Record], recipe: Recipe) -> str:
    """The reason for a run without reuse, and what to try."""
    free = [r for r in records if r.reason not in GUARDS]
    if not free:
        return (
            f"its {len(records)} steps are all warm-up ({_most_common(records)}); lower warmup or "
            "retention_ratio, or take more steps"
        )
    if any(r.reason == "nothing valid to reuse" for r in free):  # each time that it was to reuse
        return (
            "the cached values did not outlive a step; is a module called twice, or written into?"
        )
    if all(r.reason == ASKED_FOR for r in free):
        return f"{ASKED_FOR}, so every step is computed"
    when = recipe.rules[0].when
    if when.reuses_within is not None:
        return _why_outside(free, *when.reuses_within)
    signals = [s for r in free if math.isfinite(s := _signal(r))]
    if when.weighs and signals:
        return (
            f"the smallest {when.weighs} seen, {min(signals):.3g}, is above the threshold "
            f"{when.threshold:g}; raise it, and compare "
            "with running fewer steps (`fastcache calibrate` picks a threshold for a target)"
        )
    if when.weighs == "change" and when.decides_inside:
        return (
            "what it measures was never a finite number: the model produced NaN or infinity, or "
            "its first block adds nothing"
        )
    return f"{_most_common(free)}; see cache.summary() and recipe.plan(num_inference_steps)"


def _why_outside(free: Sequence[Record], lo: float, hi: float) -> str:
    seen = [r.timestep for r in free if r.timestep is not None]
    if not seen:
        return (
            "no timestep was known; pass timestep= to cache.context, or current_timestep_callback "
            "to the config"
        )
    if not any(lo < t < hi for t in seen):
        return (
            f"its timesteps, {max(seen):.4g} to {min(seen):.4g}, are never inside the range {lo:g} "
            f"to {hi:g}; give timesteps in the scheduler's scale (usually 1000 down to 0), or "
            "another range"
        )
    return f"{_most_common(free)}; see recipe.plan(num_inference_steps)"


def _most_common(records: Sequence[Record]) -> str:
    reasons = [r.reason for r in records]
    return max(set(reasons), key=reasons.count) or "no reason noted"
