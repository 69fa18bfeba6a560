# SPDX-License-Identifier: Apache-2.0
"""The order in which candidates are tried: what a calibrated run lets expect, corrected by what has come of others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..calibration.calibration import Calibration
from ..calibration.nearby import Marks
from ..calibration.outlook import Outlook
from ..recipe import Recipe
from .belief import believed
from .budget import budget, compared, shares
from .calibrated import calibrated
from .candidates import Candidate, named, without
from .deciding import try_deciding
from .goal import Goal
from .lab import Lab, Trial
from .moves import improve
from .plans import Planned, Plans

MIDDLE = 0.45  # the cost that is begun with where an error is wished for
LEADING = 4  # predictors whose schedules are looked for step by step
COUNTS = 24  # numbers of computed steps that are looked at where an error is wished for
SURE = 0.5  # dB more than wished that are looked for, since one seed does not tell others'
HOPE = 1.5  # dB that a candidate may be expected to miss a wished error by and is tried
BEHIND = 5.0  # dB that a candidate may be expected to be behind the best and is tried
CLOSE = (
    2.0  # dB that methods which decide while they run may be expected to be behind and are tried
)
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
        self.calibrations: dict[int, Calibration | None] = {}  # by `num_inference_steps`
        self.plans: dict[int, Plans] = {}
        # what was expected of recipes, by these and `num_inference_steps`
        self.planned: dict[tuple[Recipe | None, int], Planned] = {}
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
        until = 0.0
        for steps, share in shares(self.counts, self.converged):
            until += share
            self.explore(steps, until)
        self.seek(self.leading(), until)
        best = self.best()
        if self.goal.most is None and best is not None and self.goal.met(self.lab, best):
            self.most = self.lab.expected(best)
        self.deciding(self.leading())
        self.fewer()
        self.judge()
        best = self.best()
        if best is not None:
            improve(self.lab, self.goal, best, self.budget, self.likeliest)
        self.settle()

    def try_all(self, candidates: Iterable[Candidate | None]) -> list[Trial]:
        """Run candidates with the first seed; the best first."""
        trials = [self.lab.measure(c, self.first) for c in candidates if c is not None]
        return sorted((t for t in trials if t.psnr), key=self._rank, reverse=True)

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

    # --- schedules that are known beforehand -----------------------------------------------------------------------

    def explore(self, steps: int, until: float) -> None:
        """Always what should be best, until so much was spent; and presets."""
        self.calibrations[steps] = found = calibrated(self.lab, steps)
        seen = () if found is None else (found.grams, found.guides)
        self.plans[steps] = Plans(Outlook(self.lab.taken(steps), *seen), steps)
        main = steps in compared(self.counts, self.converged)
        presets = list(named(self.lab.generation.model_name, steps)) if main else []
        if self.goal.most is None:
            self.seek(steps, until)
            self.try_all(self.within_reach(presets))
            return
        for candidate in self.within_reach(presets):
            planned = self.plans[steps].planned(candidate)
            if planned is not None:  # what comes of it tells of others
                self.planned[candidate.recipe, steps] = planned
            self.try_all([candidate])
        if self.converged and main:
            # what a solver's own error makes of the cache's is in no outlook: every predictor is looked at
            plans = self.plans[steps]
            for name in plans.predictors:
                self.attempt(plans.spread(name, self.affordable(name, steps))[:1], steps)
        self.seek(steps, until)

    def seek(self, steps: int, until: float) -> None:
        """Run what should be best at this step count, again and again."""
        pick = self.nearest if self.goal.most is not None else self.cheapest
        while self.lab.spent < until and (planned := pick(steps)) is not None:
            self.attempt([planned], steps)

    def attempt(self, found: Iterable[Planned], steps: int) -> None:
        """Run candidates with the first seed, and note what was expected of them."""
        for planned in found:
            self.planned[planned.candidate.recipe, steps] = planned
            self.try_all([planned.candidate])

    def leading(self) -> int:
        """The step count of the best with a cache."""
        cached = (t.candidate.steps for t in self.trials() if t.candidate.recipe is not None)
        return next(cached, self.counts[0])

    def nearest(self, steps: int) -> Planned | None:
        """What should come nearest at the wished cost, of all that was not tried."""
        plans = self.plans[steps]
        computed = {p: self.affordable(p, steps) for p in plans.predictors}
        first = [p for name, n in computed.items() for p in plans.spread(name, n)[:1]]
        ranked = [p.predictor for _, p in self.ranked(first, steps)]
        made = [plans.all(p, computed[p] - fewer) for p in ranked[:LEADING] for fewer in (0, 1)]
        made += [plans.spread(p, computed[p]) for p in ranked[LEADING:]]
        return self.promising([p for found in made for p in found], steps)

    def ranked(self, asked: Sequence[Planned], steps: int) -> list[tuple[float, Planned]]:
        """With what is believed of them, the best first."""
        worth = believed(self.came(steps), asked)
        return sorted(zip(map(float, worth), asked, strict=True), key=lambda row: -row[0])

    def promising(self, asked: Iterable[Planned], steps: int) -> Planned | None:
        """The best of what was not tried; None where all of it should be far behind what was, of any step count."""
        left = self.untried(asked, steps)
        met = [near for trial, _, near in self._came() if self.goal.met(self.lab, trial)]
        worth, best = next(iter(self.ranked(left, steps)), (0.0, None))
        return best if worth > max(met, default=-math.inf) - BEHIND else None

    def cheapest(self, steps: int) -> Planned | None:
        """The cheapest of what should meet the wished error, or nearly, below the cost of all that does."""
        if not self.came(steps):
            return self.nearest(steps)
        wished, below = (self.goal.error or 0.0) + SURE, self.below()
        plans, taken = self.plans[steps], self.lab.taken(steps)
        first = [
            p
            for predictor in plans.predictors
            for computed in range(taken - 1, 1, -max(taken // COUNTS, 1))
            for p in plans.spread(predictor, computed)[:1]
        ]
        # those that should meet it, the cheapest first; then by how little they should miss it
        options = [
            (max(wished - worth, 0.0), self.lab.planned(start.candidate), start)
            for worth, start in self.ranked(first, steps)
        ]
        for short, cost, start in sorted(options, key=lambda option: option[:2]):
            if cost >= below:
                continue
            if short > HOPE and below < math.inf:
                return None
            made = plans.all(start.predictor, sum(start.marks))
            if left := self.untried(made, steps):
                return self.ranked(left, steps)[0][1]
        return None

    def untried(self, asked: Iterable[Planned], steps: int) -> list[Planned]:
        """Those whose recipes were not run at this step count."""
        return [p for p in asked if (p.candidate.recipe, steps) not in self.lab.trials]

    def likeliest(self, best: Trial, plans: list[Marks]) -> list[Marks]:
        """Schedules in place of a trial's, the most promising first."""
        recipe, steps = best.candidate.recipe, best.candidate.steps
        here = self.plans.get(steps)
        planned = [] if here is None or recipe is None else here.instead(recipe, plans)
        for p in planned:
            self.planned.setdefault((p.candidate.recipe, steps), p)
        return [p.marks for _, p in self.ranked(planned, steps)] or plans

    def affordable(self, predictor: str, steps: int) -> int:
        """How many steps it may compute at the cost that is looked at; never all."""
        most = self.goal.planned or self.most
        taken = self.lab.taken(steps)
        return min(
            self.lab.cost.affordable(self.plans[steps].kind(predictor), taken, most), taken - 1
        )

    def came(self, steps: int) -> list[tuple[Planned, float]]:
        """The planned runs of so many steps, with how near they came, dB."""
        return [
            (planned, near)
            for trial, planned, near in self._came()
            if trial.candidate.steps == steps
        ]

    def _came(self) -> Iterator[tuple[Trial, Planned, float]]:
        for key, trial in self.lab.trials.items():
            if key in self.planned and self.first in trial.psnr:
                yield trial, self.planned[key], min(trial.psnr[self.first], EXACT)

    def within_reach(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Those that should cost about as much as is wished, or less than all that meets the wished error."""
        most = self.goal.most
        low, high = (0.0, self.below()) if most is None else (NEAR[0] * most, NEAR[1] * most)
        for candidate in candidates:
            if low < self.lab.planned(candidate) < high:
                yield candidate

    def below(self) -> float:
        """The cost of the cheapest that meets the wished error with what other seeds may take of it."""
        sure = [t for t in self.trials() if t.quality >= (self.goal.error or 0.0) + SURE]
        return min((self.lab.expected(t) for t in sure), default=math.inf)

    def deciding(self, steps: int) -> None:
        """Methods that decide while they run, where a calibrated run gives their thresholds."""
        calibration = self.calibrations.get(steps)
        if calibration is None:
            return
        best, near = self.best(), [found for _, found in self.came(steps)]

        def close(candidate: Candidate, marks: Marks) -> bool:
            planned = self.plans[steps].expecting(candidate, marks)
            if planned is None or not near:
                return True
            return self.ranked([planned], steps)[0][0] > max(near) - CLOSE

        try_deciding(self.lab, calibration, steps, best, self.most, close)

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
