# SPDX-License-Identifier: Apache-2.0
"""Which steps to compute, planned on what one run has shown: a shortest path over steps.

From the Gram matrix of a run's values, one per step, the error of any weighted sum of them follows without the values:
for coefficients c, |sum_t c_t v_t|^2 = c^T G c. A path goes from computed step to computed step; an edge costs what is
forecast wrongly between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from ..checks import whole
from ..made_for import MadeFor
from ..policies import Mask, Policy, Spread
from ..predictors import Fitted, Predictor, Taylor
from ..recipe import Recipe
from .errors import CalibrationError
from .grams import Array, gram_of
from .missed import Missed
from .nearby import Marks, climbed, computed_of, marked
from .outlook import Outlook
from .weights import fitted_weights

Cost = Literal["steps", "final", "run"]
# Computed steps by which paths are told apart, at most: for predictors that keep no more the plan is the best one.
REACH = 3
GROWTHS = (1.0, 1.2, 0.85)  # of the gaps of schedules that a search for the nearest run starts from


class Edges:
    """What it costs to skip all steps between two computed ones.

    gram: [T, T] of the values of a run. missed: what a forecast leaves wrong. cost: "steps" adds up the errors of all
    skipped values, as DPCache does; "final" takes the error that they leave together in the latents, as LeMiCa does.
    lengths: how far each step moves the latents, [T]; of use for "final" alone.
    """

    def __init__(self, gram: Array, missed: Missed, cost: Cost, lengths: Array) -> None:
        self.gram, self.missed, self.cost, self.lengths = gram, missed, cost, lengths
        self.what, self.steps = missed.what, len(gram)
        self.known: dict[tuple[int, ...], list[float]] = {}

    def __call__(self, kept: tuple[int, ...], then: int) -> float:
        """From the newest of `kept`, computed steps with the newest first, to `then`, which is computed again."""
        kept = kept[: self.what.depth]
        if kept not in self.known:
            self.known[kept] = self._costs(kept)
        return self.known[kept][then - kept[0] - 1]

    def _costs(self, kept: tuple[int, ...]) -> list[float]:
        """By how many steps are skipped: none, one, and so on to the end."""
        found, total, moved = [0.0], 0.0, np.zeros(self.steps)
        for step in range(kept[0] + 1, self.steps):
            missed = self.missed(kept, step)
            total += self.size(missed)
            moved += self.lengths[step] * missed
            found.append(total if self.cost == "steps" else self.size(moved))
        return found

    def size(self, c: Array) -> float:
        return math.sqrt(max(float(c @ self.gram @ c), 0.0))


def added(cost: Any, edge: float) -> Any:
    """A path's cost as the sum of its edges'."""
    return cost + edge


def largest_first(cost: Any, edge: float) -> Any:
    """A path's cost as its edges' in falling order: the largest counts first (LeMiCa's lexicographic minimax)."""
    return tuple(sorted((*cost, edge), reverse=True))


def planned(
    gram: Sequence[Sequence[float]] | Array,
    computed: int,
    what: Predictor,
    cost: Cost = "steps",
    first: int = 3,
    last: bool = True,
    max_skips: int | None = None,
    lengths: Sequence[float] | None = None,
    guide: Array | None = None,
) -> list[int]:
    """The steps to compute, ascending, that cost least. See `Calibration.plan` for the arguments.

    guide: what is known of what a guided predictor looks at, [T, T].
    """
    matrix = np.array(gram, dtype=np.float64)
    total = len(matrix)
    given = _checked(total, computed, what, cost, first, max_skips, lengths, guide is not None)
    edges = Edges(matrix, Missed(total, what, matrix, guide), cost, given)
    combine, nothing = (added, 0.0) if cost == "steps" else (largest_first, ())
    gap = total if max_skips is None else max_skips + 1
    start, reach = tuple(range(first)), min(what.depth, REACH)
    paths: dict[tuple[int, ...], tuple[Any, tuple[int, ...]]] = {
        start[-reach:]: (nothing, start)
    }  # by the newest computed steps: the cheapest path that ends in them
    goal = total - 1 if last else total
    for left in range(computed - first - last, 0, -1):
        longer: dict[tuple[int, ...], tuple[Any, tuple[int, ...]]] = {}
        for so_far, path in paths.values():
            kept = path[::-1]
            for then in range(path[-1] + 1, min(path[-1] + gap, goal - left) + 1):
                if goal - then > left * gap:
                    continue  # the end would be out of reach
                told = combine(so_far, edges(kept, then))
                state = (*path, then)[-reach:]
                if state not in longer or told < longer[state][0]:
                    longer[state] = told, (*path, then)
        paths = longer
    ends = [
        (combine(so_far, edges(path[::-1], goal)), path)
        for so_far, path in paths.values()
        if goal - path[-1] <= gap
    ]
    if not ends:
        raise CalibrationError(
            f"calibration: max_skips is {max_skips}, with which {computed} computed steps do not reach the end of "
            f"{total}"
        )
    _, best = min(ends)
    return [*best, goal] if last else list(best)


def nearest(
    outlook: Outlook,
    start: Sequence[int],
    what: Predictor,
    first: int,
    last: bool,
    max_skips: int | None,
) -> list[int]:
    """As many steps as in `start`, whose run should come nearest: looked for from it and from evenly spread ones."""
    total, gap = outlook.steps, outlook.steps if max_skips is None else max_skips + 1
    share = len(start) / total
    first = max(first, what.needs)

    def allowed(marks: Marks) -> bool:
        computed = computed_of(marks)
        ends = [*computed, total] if not last else computed
        near = all(b - a <= gap for a, b in pairwise(ends))
        return all(marks[:first]) and marks[-1] >= last and near

    starts = [marked(start, total)]
    for growth in GROWTHS:
        spread = Spread(share, first, growth, last=last)
        starts.append(marked(Recipe(spread, what).plan(total).computed, total))
    fits = [s for s in starts if allowed(s) and sum(s) == len(start)]
    found = [climbed(outlook, what, marks, allowed) for marks in fits or starts[:1]]
    best = max(found, key=lambda marks: outlook.expected(what, marks))
    return computed_of(best)


def _checked(
    total: int,
    computed: int,
    what: Predictor,
    cost: str,
    first: int,
    max_skips: int | None,
    lengths: Sequence[float] | None,
    guided: bool,
) -> Array:
    """The lengths of the steps; an error that names the argument where one makes no sense."""
    owner = "Calibration.plan"
    whole(owner, "first", first, 1)
    whole(owner, "computed", computed, 1)
    if max_skips is not None:
        whole(owner, "max_skips", max_skips, 1)
    if not first < computed < total:
        raise CalibrationError(
            f"calibration: computed is {computed}, must be above {first}, the first steps that are computed anyway, "
            f"and below {total}, the steps of the run"
        )
    if cost not in get_args(Cost):
        raise CalibrationError(f"calibration: cost is {cost!r}, must be one of {get_args(Cost)}")
    told = (what.guide is None or guided) and what.fitted is None and not what.per_module
    if not told or what.table or what.feeds_back or not what.depth:
        raise CalibrationError(
            f"calibration: what is a {type(what).__name__}, whose weights of computed values are not known beforehand; "
            "plan with Reuse(), Taylor(), Hermite(), Chebyshev(), or a guide whose inner products were recorded"
        )
    found = np.ones(total) if lengths is None else np.array(lengths, dtype=np.float64)
    if found.shape != (total,) or not np.isfinite(found).all():
        raise CalibrationError(
            f"calibration: lengths must hold {total} finite numbers, one per step"
        )
    return found


class Plans:
    """What a calibration plans: its fields are those of `Calibration`."""

    grams: Mapping[str, tuple[tuple[float, ...], ...]]
    guides: Mapping[str, Mapping[str, tuple[tuple[float, ...], ...]]]
    model: str
    scheduler: str

    def plan(
        self,
        computed: int,
        what: Predictor | None = None,
        *,
        cost: Cost = "steps",
        first: int = 3,
        last: bool = True,
        max_skips: int | None = None,
        lengths: Sequence[float] | None = None,
        context: str | None = None,
    ) -> Recipe:
        """The recipe whose computed steps cost least along the calibrated trajectory, for this many of them.

        A forecast is held against what the run has stored there, so errors of earlier skips are not in it: compare
        plans by whole runs. For predictors that keep more than 3 values the plan is a good one, not the best.

        Args:
            computed: steps to compute, a count above `first` and below the steps of the run.
            what: a predictor whose weights are known beforehand, or a guided one whose guide is in `guides`; None:
                `Taylor(order=1)`.
            cost: "steps" adds up the errors of all skipped values (DPCache); "final" takes, from one computed step
                to the next, the error that they leave together in the latents, and has the largest of these as small as
                can be (LeMiCa); "run" takes what all of them leave together, each as a share of its value, and moves
                single steps from several schedules on as long as that falls.
            first: steps computed at the start, a count >= 1.
            last: whether the last step is computed.
            max_skips: most steps skipped in a row, a count; None: any number.
            lengths: how far each step moves the latents, one number per step, such as differences of sigmas, for
                "final" and "run"; None: all as far.
            context: a name in `grams`; None takes all contexts together.
        Returns:
            A recipe of a `Mask` and the predictor, on the stack; elsewhere than on this model, scheduler and length of
            run it says so.
        Raises:
            TypeError: an argument is of another type; the message names it.
            CalibrationError: an argument is out of its range, or nothing was measured.
        Source: DPCache (CVPR 2026); LeMiCa (arXiv 2511.00090); "run" is ours.
        """
        what = Taylor(order=1) if what is None else what
        Recipe(Mask((True,)), what)  # which names what does not go with a stack
        what = what.on_block("modulated" in self.guides)
        gram = gram_of(self.grams, context)
        seen = self.guides.get(what.guide or "")
        guide = None if seen is None else gram_of(seen, context)
        ways: Cost = "final" if cost == "run" else cost
        steps = planned(gram, computed, what, ways, first, last, max_skips, lengths, guide)
        if cost == "run":
            outlook = Outlook(len(gram), *self._of(context), lengths)
            steps = nearest(outlook, steps, what, first, last, max_skips)
        marks = marked(steps, len(gram))
        made_for = MadeFor(self.model, self.scheduler, len(marks))
        return Recipe.of(Recipe(Mask(marks, scaled=True), what).rules, "plan", made_for)

    def _of(self, context: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inner products and those of guides, of one context or of all."""
        guides = {
            guide: {name: rows for name, rows in found.items() if context in (None, name)}
            for guide, found in self.guides.items()
        }
        return {n: rows for n, rows in self.grams.items() if context in (None, n)}, guides

    def fit(
        self, when: Policy, keep: int = 3, ridge: float = 1e-3, context: str | None = None
    ) -> Fitted:
        """Weights for each step that a schedule skips, by least squares over the calibrated runs.

        Args:
            when: a policy whose schedule is known beforehand, such as that of a plan.
            keep: values kept and weighted, 1 to 7.
            ridge: pull of the weights toward the line through the newest two values, relative to the values' mean
                square, unitless, >= 0.
            context: a name in `grams`; None takes all contexts together.
        Returns:
            A predictor for this schedule; steps skipped otherwise are forecast by a line.
        Raises:
            TypeError: an argument is of another type; the message names it.
            CalibrationError: an argument is out of its range, or nothing was measured.
            ValueError: the policy decides on data of the run.
        Source: L2P (CVPR 2026), from the paper.
        """
        gram = gram_of(self.grams, context)
        plan = Recipe(when, Fitted((), keep)).plan(len(gram))
        return fitted_weights(gram, [i in plan.computed for i in range(len(gram))], keep, ridge)
