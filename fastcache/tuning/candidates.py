# SPDX-License-Identifier: Apache-2.0
"""What a tuning tries: predictors, schedules for a number of computed steps, presets, and thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product, starmap
from typing import Any

from ..calibration.calibration import Calibration
from ..calibration.errors import CalibrationError
from ..calibration.nearby import Marks, marked
from ..configs.given import settings_of
from ..configs.presets import preset, presets
from ..policies import (
    COMPUTE,
    FirstBlock,
    InputChange,
    Interval,
    Magnitude,
    Mask,
    OutputSlope,
    Policy,
    Spread,
    Step,
)
from ..predictors import Guided, Hermite, Predictor, Reuse, Taylor
from ..recipe import Recipe, Rule
from ..targets.spec import Output, Target

# What predicts, the likeliest first.
PREDICTORS: dict[str, Predictor] = {
    "modulated guide, order 1": Guided(1, "modulated"),
    "Taylor 2, step 0 forgotten": Taylor(2, skip_first=True),
    "Taylor 2, exact, step 0 forgotten": Taylor(2, "exact", skip_first=True),
    "modulated guide, order 2": Guided(2, "modulated"),
    "Taylor 1, exact": Taylor(1, "exact"),
    "Taylor 2, exact": Taylor(2, "exact"),
    "Taylor 3, exact": Taylor(3, "exact"),
    "residual guide": Guided(),
    "residual guide, order 1": Guided(1),
    "reuse": Reuse(),
    "half slope": Hermite(1),
}


@dataclass(frozen=True)
class Shape:
    """Where the computed steps of a run lie, however many they are: fields of `Spread`."""

    first: int
    growth: float = 1.0
    last: bool = True

    @property
    def name(self) -> str:
        """In words."""
        grown = "" if self.growth == 1 else f", gaps grow by {self.growth:g}"
        return f"warm-up {self.first}{grown}{'' if self.last else ', no last'}"

    def policy(self, steps: int, computed: int) -> Policy | None:
        """The schedule of so many computed steps of a run; None where there is none."""
        if computed < self.first + self.last:
            return None
        return Spread(computed / steps, self.first, self.growth, last=self.last)


@dataclass(frozen=True)
class EveryNth:
    """Computed steps at equal gaps, after as long a warm-up as their number allows, and so many at the end."""

    n: int
    last: int = 1

    @property
    def name(self) -> str:
        """In words."""
        return f"every {self.n}" + {0: ", no last", 1: ""}.get(self.last, f", last {self.last}")

    def policy(self, steps: int, computed: int) -> Policy | None:
        """The schedule of at most so many computed steps of a run; None where there is none."""
        end = steps - self.last
        for warmup in range(min(computed, end), 0, -1):
            if warmup + len(range(warmup - 1 + self.n, end, self.n)) + self.last <= computed:
                return Interval(self.n, stop=end, warmup=warmup, last=False)
        return None


SHAPES: tuple[Shape | EveryNth, ...] = (
    *starmap(Shape, product((2, 1, 3, 4, 5), (1.0, 1.2, 0.85, 1.35), (True, False))),
    *starmap(EveryNth, product(range(2, 8), (1, 0, 2))),
)


@dataclass(frozen=True)
class Candidate:
    """One thing to try.

    Args:
        name: in words.
        recipe: None is a run without a cache.
        steps: what `num_inference_steps` is.
    """

    name: str
    recipe: Recipe | None
    steps: int

    @property
    def kind(self) -> str:
        """What candidates whose reused steps cost the same have in common; "" without a cache."""
        if self.recipe is None:
            return ""
        return "; ".join(map(_kind, self.recipe.rules))


def _kind(rule: Rule) -> str:
    if rule.where.scope in ("stack", "output"):
        return f"{rule.what.guide} {rule.where.scope} {rule.when.signal}"
    return repr(rule)  # what such a step still computes differs from rule to rule


def without(steps: int) -> Candidate:
    """A run of so many steps without a cache."""
    return Candidate(f"{steps} steps, no cache", None, steps)


def shaped(
    predictor: str, shape: Shape | EveryNth, steps: int, taken: int, computed: int
) -> Candidate | None:
    """A predictor on a schedule that computes at most `computed` of the `taken` steps; None where none does."""
    for asked in range(min(computed, taken), 0, -1):
        when = shape.policy(taken, asked)
        if when is None:
            return None
        recipe = Recipe(when, PREDICTORS[predictor])
        # a guide may have more steps computed than its schedule asks for
        if len(recipe.plan(taken).computed) <= computed:
            return Candidate(f"{predictor}, {shape.name}", recipe, steps)
    return None


def masked(
    marks: Sequence[bool], what: Predictor, where: Target, name: str, steps: int
) -> Candidate:
    """A predictor on exactly these computed steps."""
    return Candidate(name, Recipe(Mask(tuple(marks), scaled=True), what, where), steps)


def named(model: str, steps: int) -> Iterator[Candidate]:
    """Presets: budgets, masks of this many steps, and what others have published for a family of models."""
    for name, row in presets().items():
        family = name.split("/")[0]
        budget = "config" not in row and family != "mask"
        fits = row["steps"] == steps if family == "mask" else family in model.lower()
        if budget or fits:
            recipe, _ = settings_of(preset(name))
            yield Candidate(f"preset {name}", recipe, steps)


# --- thresholds, from one calibration run ------------------------------------------------------------------


def thresholds(
    calibration: Calibration, share: float, steps: int
) -> Iterator[tuple[Candidate, Marks]]:
    """Rules that decide while they run, at thresholds that compute about a share of the calibrated steps, and which."""
    four: dict[str, Any] = {"warmup": 4, "last": True}
    two: dict[str, Any] = {"warmup": 2, "last": True}
    reuse, order_1 = Reuse(), Taylor(1)

    def first_block(what: Predictor, **guards: Any) -> tuple[Recipe, Sequence[int]]:
        threshold = calibration.first_block_threshold(share, **guards)
        computed = calibration.computed_steps(threshold, **guards)
        return Recipe(FirstBlock(threshold, **guards), what), computed

    def magnitude(what: Predictor, **guards: Any) -> tuple[Recipe, Sequence[int]]:
        fields: dict[str, Any] = {"retention_ratio": 0.1, "max_skip_steps": 8}
        threshold = calibration.mag_threshold(share, **fields)
        count, ratios = calibration.steps, calibration.mag_ratios
        when = Magnitude(
            threshold, num_inference_steps=count, mag_ratios=ratios, **fields, **guards
        )
        return Recipe(when, what), Recipe(when, what).plan(count).computed

    def input_change(what: Predictor) -> tuple[Recipe, Sequence[int]]:
        when, computed = _input_change(calibration, share)
        return Recipe(when, what), computed

    makers: tuple[tuple[str, Callable[[], tuple[Recipe, Sequence[int]]]], ...] = (
        ("FirstBlock, guided", lambda: first_block(Guided(), **two)),
        ("FirstBlock, Taylor 1", lambda: first_block(order_1, **four)),
        ("FirstBlock, reuse", lambda: first_block(reuse)),
        ("MagCache, Taylor 1", lambda: magnitude(order_1, **four)),
        ("MagCache, reuse", lambda: magnitude(reuse)),
        ("TeaCache, Taylor 1", lambda: input_change(order_1)),
        ("TeaCache, reuse", lambda: input_change(reuse)),
    )
    for name, make in makers:
        try:
            recipe, computed = make()
        except CalibrationError:
            continue  # nothing was measured that it needs, or no threshold computes so few steps
        yield Candidate(name, recipe, steps), marked(computed, calibration.steps)


def easy_cache(threshold: float, what: Predictor, steps: int) -> Candidate:
    """EasyCache's rule, whose threshold no calibration tells."""
    when = OutputSlope(threshold, warmup=3, last=True)
    name = "reuse" if not what.forecasts else "Taylor 1"
    return Candidate(f"EasyCache, {name}", Recipe(when, what, Output()), steps)


def _input_change(calibration: Calibration, share: float) -> tuple[Policy, Sequence[int]]:
    """TeaCache's rule at the threshold that computes about a share of the steps along the calibrated run, and which."""
    fit = calibration.input_fit()
    changes = [x for x, _ in next(iter(calibration.input_changes.values()))]
    steps = len(changes) + 1
    low, high = 0.0, 1e3

    def computed(threshold: float) -> list[int]:
        policy = InputChange(threshold, fit.coefficients)
        run = policy.begin(steps)
        return [
            i
            for i in range(steps)
            if policy.decide(run, Step(i, steps), changes[i - 1] if i else None).action == COMPUTE
        ]

    for _ in range(40):
        threshold = (low + high) / 2
        few = len(computed(threshold)) < share * steps
        low, high = (low, threshold) if few else (threshold, high)
    threshold = float(f"{high:.4g}")
    return InputChange(threshold, fit.coefficients), computed(threshold)
