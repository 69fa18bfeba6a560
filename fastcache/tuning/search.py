# SPDX-License-Identifier: Apache-2.0
"""The order in which candidates are tried: successive halving over predictors, schedules, steps and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..policies import Interval
from ..predictors import Reuse, Taylor
from ..recipe import Recipe
from .budget import budget, compared
from .candidates import (
    AFTER,
    PREDICTORS,
    SHAPES,
    Candidate,
    Shape,
    named,
    shaped,
    without,
)
from .deciding import bisect_easy_cache, found_thresholds
from .goal import Goal
from .lab import Lab, Trial
from .moves import improve
from .pairs import promising

MIDDLE = 0.45  # the cost at which predictors are compared where none is wished for
STARTED = (MIDDLE, 0.3, 0.65, 0.2, 0.8)  # and others, where none meets the wished error there
COMBINATIONS = 5  # predictors with schedules that go on to other step counts
SHAPES_FIRST = 5  # schedules that are tried before predictors and schedules are compared across
PREDICTORS_KEPT = 2  # that are tried on every schedule where an error is wished
ACROSS = 0.55  # of the budget, up to which predictors are tried with schedules
BEHIND = 3.0  # dB that methods which decide may be behind and more of them are tried
FINALISTS = 4  # that are judged on a second seed; half of them on a third
SETTLED = 6  # times that the best of all is judged or timed again, until it stays the best
ROUNDS = 2  # timings more of the best
MARGIN = 0.1  # dB by which a cache must be nearer than a run without one of equal cost,
NEAR = (0.75, 1.05)  # shares of the wished cost between which presets are tried
EXACT = 90.0  # dB beyond which runs differ by rounding alone
CHEAPER = 0.01  # or the share by which it must be cheaper than one of equal error


class Search:
    """One tuning, from the first run to the best.

    Args:
        lab: where candidates are measured.
        goal: what is wished for.
        counts: `num_inference_steps` to try, the usual one first.
    """

    def __init__(self, lab: Lab, goal: Goal, counts: Sequence[int]) -> None:
        self.lab, self.goal, self.counts = lab, goal, tuple(counts)
        self.combinations: dict[tuple[Recipe | None, int], tuple[str, Shape]] = {}
        self.paired: dict[
            tuple[str, Shape, int], float
        ] = {}  # what came of them with the first seed, dB
        self.converged = lab.many != lab.usual  # what the reference is
        self.budget = budget(counts, self.converged)
        self.most = goal.most if goal.most is not None else MIDDLE
        self.first = lab.seeds[0]
        self.converges: float | None = (
            None  # how near a run of half as many steps comes to the reference, dB
        )

    # --- what was found -----------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All that were run, the best first."""
        run = [t for t in self.lab.trials.values() if t.psnr]
        return sorted(run, key=self._rank, reverse=True)

    def _rank(self, trial: Trial) -> tuple[Any, ...]:
        return self.goal.rank(self.lab, trial)

    def best(self) -> Trial | None:
        """The best of those that were judged on most seeds; without a cache where nothing is better."""
        trials = self.trials()
        # a run that some seeds have not seen may owe its lead to the others
        widest = max((len(t.psnr) for t in trials if t.candidate.recipe is not None), default=0)
        judged = [t for t in trials if len(t.psnr) >= widest]
        best = max(judged, key=self._rank, default=None)
        plain = max((t for t in judged if t.candidate.recipe is None), key=self._rank, default=None)
        if best is not None and plain is not None and self._as_good(plain, best):
            return plain
        return best

    def _as_good(self, plain: Trial, best: Trial) -> bool:
        """Whether a run without a cache is as good as the best within what nobody sees."""
        if not self.goal.met(self.lab, plain) or not self.goal.met(self.lab, best):
            return plain is best
        if self.goal.most is not None:
            return min(best.quality, EXACT) - min(plain.quality, EXACT) < MARGIN
        return self.lab.expected(plain) < self.lab.expected(best) * (1 + CHEAPER)

    # --- the search -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Try everything. An OutOfTime leaves what was measured until then."""
        usual = self.counts[0]
        self.lab.begin()
        self.lab.uncached_usual()
        if self.converged:
            self.lab.measure(without(usual), self.first)
            self.converges = self.lab.converged_to()
        self.fewer()
        if self.goal.most is not None:
            for steps in compared(self.counts, self.converged):
                self.compare(steps)
        else:
            for self.most in STARTED:
                if self.compare(usual):
                    break
            self.narrow(usual)
        steps = self.other_counts()
        if self.goal.most is not None:
            self.across(steps)
        else:
            self.all_shapes(steps)
        self.deciding(steps)
        self.fewer()
        self.judge()
        best = self.best()
        if best is not None:
            improve(self.lab, self.goal, best, self.budget)
        self.settle()

    def try_all(self, candidates: Iterable[Candidate | None]) -> list[Trial]:
        """Run candidates with the first seed; the best first."""
        trials = [self.lab.measure(c, self.first) for c in candidates if c is not None]
        return sorted((t for t in trials if t.psnr), key=self._rank, reverse=True)

    def fit(self, predictor: str, shape: Shape, steps: int) -> Candidate | None:
        """A predictor on a schedule, with as many computed steps as the wished cost allows."""
        taken = self.lab.taken(steps)
        made = shaped(predictor, shape, steps, taken, taken)
        if made is None:
            return None
        computed = self.lab.cost.affordable(made.kind, taken, self.most)
        made = shaped(predictor, shape, steps, taken, computed)
        if made is not None:
            self.combinations[made.recipe, steps] = predictor, shape
        return made

    def fewer(self) -> None:
        """Runs without a cache at the wished cost, which a cache has to be better than."""
        if "num_inference_steps" not in self.lab.generation.takes:
            return
        usual = self.counts[0]
        if self.goal.most is None:
            self.bisect_fewer(usual)
            return
        taken = self.lab.cost.affordable("", self.lab.taken(usual), self.most)
        self.lab.measure(without(max(round(taken * usual / self.lab.taken(usual)), 1)), self.first)

    def bisect_fewer(self, usual: int) -> None:
        """The fewest steps without a cache that meet the wished error."""
        low, high = 0, usual
        while high - low > 1:
            steps = (low + high) // 2
            trial = self.lab.measure(without(steps), self.first)
            low, high = (low, steps) if self.goal.met(self.lab, trial) else (steps, high)

    def compare(self, steps: int) -> bool:
        """Presets, the predictors on one schedule, the best of them on a few; whether one is as was wished."""
        tried = self.try_all(self.within_reach(named(self.lab.generation.model_name, steps)))
        tried += self.pair(((p, SHAPES[0]) for p in PREDICTORS if self.likely(p, steps)), steps)
        best = [p for p, _ in self.leading(steps)][:1]
        tried += self.pair(((p, s) for p in best for s in SHAPES[1:SHAPES_FIRST]), steps)
        return any(self.goal.met(self.lab, t) for t in tried)

    def pair(self, pairs: Iterable[tuple[str, Shape]], steps: int) -> list[Trial]:
        """Try predictors with schedules, and note what comes of each; the best first."""
        found: list[Trial] = []
        for predictor, shape in pairs:
            tried = self.try_all([self.fit(predictor, shape, steps)])
            self.paired[predictor, shape, steps] = max(
                (t.psnr[self.first] for t in tried), default=-math.inf
            )
            found += tried
        return sorted(found, key=self._rank, reverse=True)

    def at(self, steps: int) -> dict[tuple[str, Shape], float]:
        """What came of predictors with schedules in runs of so many steps."""
        return {(p, s): found for (p, s, n), found in self.paired.items() if n == steps}

    def likely(self, predictor: str, steps: int) -> bool:
        """Whether a predictor is no variant of one that is far behind."""
        found = self.at(steps)
        before = found.get((AFTER.get(predictor, ""), SHAPES[0]))
        return before is None or before > max(found.values()) - BEHIND

    def within_reach(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Those that should cost about as much as is wished; where an error is wished, all."""
        most = self.goal.most
        for candidate in candidates:
            if most is None or NEAR[0] < self.lab.planned(candidate) / most < NEAR[1]:
                yield candidate

    def leading(self, steps: int | None) -> Iterator[tuple[str, Shape]]:
        """Predictors with schedules, the best first; steps: that they ran with, None for any."""
        for trial in self.trials():
            found = self.combinations.get((trial.candidate.recipe, trial.candidate.steps))
            if found is not None and steps in (None, trial.candidate.steps):
                yield found

    def narrow(self, steps: int) -> None:
        """The lowest cost at which one of the leading combinations meets the wished error."""
        for predictor, shape in list(dict.fromkeys(self.leading(steps)))[:COMBINATIONS]:
            taken = self.lab.taken(steps)
            low, high = shape.first + shape.last, taken
            while high - low > 1:
                computed = (low + high) // 2
                made = shaped(predictor, shape, steps, taken, computed)
                met = False
                if made is not None:
                    trial = self.lab.measure(made, self.first)
                    self.combinations[made.recipe, steps] = predictor, shape
                    met = self.goal.met(self.lab, trial)
                low, high = (low, computed) if met else (computed, high)
        best = self.best()
        if best is not None and self.goal.met(self.lab, best):
            self.most = self.lab.expected(best)

    def other_counts(self) -> int:
        """The leading combinations at other step counts; the one with the best of all."""
        usual = self.counts[0]
        leading = list(dict.fromkeys(self.leading(None)))[:COMBINATIONS]
        for steps in self.counts if len(self.counts) > 1 else ():
            self.pair(leading, steps)
        cached = (t for t in self.trials() if t.candidate.recipe is not None)
        return next((t.candidate.steps for t in cached), usual)

    def across(self, steps: int) -> None:
        """Predictors with schedules, always those whose parts have done best so far."""
        while self.lab.spent < ACROSS * self.budget:
            pair = promising(self.at(steps), tuple(PREDICTORS), SHAPES)
            if pair is None:
                return
            self.pair([pair], steps)

    def all_shapes(self, steps: int) -> None:
        """The leading predictors on every schedule, with a step less as long as that meets the wished error."""
        leading = list(dict.fromkeys(p for p, _ in self.leading(steps)))[:PREDICTORS_KEPT]
        shapes = [(p, s) for p in leading for s in SHAPES]
        trials = self.pair(shapes, steps)
        while trials and self.goal.met(self.lab, trials[0]):
            met = [t for t in trials if self.goal.met(self.lab, t)]
            keys = [(t.candidate.recipe, t.candidate.steps) for t in met]
            shapes = [self.combinations[key] for key in keys]
            self.most = self.lab.expected(met[0]) - self.lab.cost.step / 2
            trials = self.pair(shapes, steps)

    def deciding(self, steps: int) -> None:
        """Methods that decide while they run, at thresholds from one calibration run."""
        taken = self.lab.taken(steps)
        kind = Candidate("", Recipe(Interval(2)), steps).kind
        share = max(self.lab.cost.affordable(kind, taken, self.most) / taken, 1.5 / taken)
        entry = self.lab.remembered(
            f"calibration {steps}",
            lambda: found_thresholds(self.lab.generation, self.first, steps, share),
        )
        self.lab.tick(taken / self.lab.cost.usual, "calibration")
        rows = [(name, Recipe.from_dict(rules)) for name, rules in entry["recipes"]]
        best = self.best()
        forecasts = (
            best is None
            or best.candidate.recipe is None
            or best.candidate.recipe.rules[0].what.forecasts
        )
        # the same decisions with a forecast or without one: what the predictors have shown holds for them too
        tried = self.try_all(
            Candidate(name, recipe, steps)
            for name, recipe in rows
            if recipe.rules[0].what.forecasts == forecasts
        )
        if best is None or not tried or tried[0].quality > best.quality - BEHIND:
            bisect_easy_cache(self.lab, Taylor(1) if forecasts else Reuse(), steps, share)

    # --- the final ----------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """The better ones with every other seed, half as many of them with each."""
        kept = self.trials()[:FINALISTS]
        plain = [t for t in self.trials() if t.candidate.recipe is None][:1]
        for seed in self.lab.seeds[1:]:
            for trial in [*kept, *(t for t in plain if t not in kept)]:
                self.lab.measure(trial.candidate, seed)
            kept = sorted(kept, key=self._rank, reverse=True)[: max(len(kept) // 2, 3)]

    def settle(self) -> None:
        """Judge with every seed, and time again, what is best until that is one that was."""
        for _ in range(SETTLED):
            best = next(iter(self.trials()), None)
            if best is None or best.candidate.recipe is None:
                return
            left = [seed for seed in self.lab.seeds if seed not in best.psnr]
            if not left and len(best.ratios) >= len(self.lab.seeds) + ROUNDS:
                return
            for seed in left or self.lab.seeds[:1] * ROUNDS:
                self.lab.measure(best.candidate, seed, again=not left)
