# SPDX-License-Identifier: Apache-2.0
"""Where candidates are measured: their time beside that of the uncached run, their pictures beside the reference."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..policies import Interval
from ..recipe import Recipe
from .candidates import Candidate, without
from .cost import Cost
from .generation import Generation, Outcome
from .journal import Journal
from .pictures import Picture, psnr

EVERY = 5.0  # uncached runs' time between two timings of one
REFERENCE = "reference"  # what a progress line calls such a run, which counts for no budget
REPEATS = 30.0  # dB that two uncached runs must be near each other


class OutOfTime(Exception):
    """The time limit leaves no room for another run."""


@dataclass
class Trial:
    """What is known of one candidate."""

    candidate: Candidate
    taken: int  # steps of its run, as the denoiser counts them
    psnr: dict[int, float] = field(default_factory=dict)  # by seed, dB to the reference
    ratios: list[float] = field(default_factory=list)  # of the uncached run's time
    computed: float = 0.0  # steps, of `taken`
    marks: tuple[bool, ...] = ()
    error: str = ""

    @property
    def quality(self) -> float:
        """Mean over seeds, dB."""
        if self.error or not self.psnr:
            return -math.inf
        return statistics.fmean(self.psnr.values())


class Lab:
    """Runs candidates and remembers what came of them.

    Args:
        generation: what is measured.
        usual: `num_inference_steps` of the usual run, whose time is 1.
        many: `num_inference_steps` of the reference.
        seeds: in the order in which they are tried.
        journal: what earlier sittings have measured, and what this one adds to it.
        limit: seconds that all sittings may take; None: any.
        tick: told of the cost of every run that is over, and of what it was.
    """

    def __init__(
        self,
        generation: Generation,
        usual: int,
        many: int,
        seeds: Sequence[int],
        journal: Journal,
        limit: float | None,
        tick: Any,
    ) -> None:
        self.generation, self.usual, self.many, self.seeds = generation, usual, many, tuple(seeds)
        self.journal, self.limit, self._tell = journal, limit, tick
        self.began = time.monotonic()
        self.trials: dict[tuple[Recipe | None, int], Trial] = {}
        self._references: dict[int, list[Picture]] = {}
        self._uncached: list[float] = []
        self._timed: set[int] = set()  # seeds that the uncached run was timed with
        self._last: dict[int, list[Picture]] = {}  # of the latest uncached run, by seed
        self._since, self.repeats = 0.0, math.inf
        self._taken: dict[int, int] = {}
        self.cost = Cost(usual)
        self.spent = 0.0  # uncached runs' time that was taken so far, references left out
        self.size: list[int] = []  # pictures of a run, and the shape of one

    @property
    def elapsed(self) -> float:
        """Seconds, with those of earlier sittings."""
        return self.journal.spent + time.monotonic() - self.began

    @property
    def base(self) -> float:
        """Seconds of the latest uncached run: a machine is busy for a while, so that the nearest tells most."""
        return self._uncached[-1] if self._uncached else 0.0

    @property
    def seconds(self) -> float:
        """Its seconds over the whole tuning."""
        return statistics.median(self._uncached) if self._uncached else 0.0

    @property
    def doubt(self) -> float:
        """By what share costs may be wrong."""
        return self.cost.doubt(len(self._uncached))

    # --- the uncached run -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Time the uncached run, see that it repeats, and count its steps.

        Raises:
            ValueError: two uncached runs differ, `generate` does not call the target, or takes other steps.
        """
        self.time_uncached()
        self.repeats = self.time_uncached()
        if self.repeats < REPEATS:
            raise ValueError(
                f"tune: two uncached runs of generate are {self.repeats:.0f} dB apart; draw the noise from the "
                "argument `seed`, so that runs can be compared"
            )
        self.cost.usual = self.taken(self.usual)
        if "num_inference_steps" not in self.generation.takes and self.cost.usual != self.usual:
            raise ValueError(
                f"tune: steps is {self.usual}, but a run of generate takes {self.cost.usual}; pass "
                f"steps={self.cost.usual}, or have generate declare num_inference_steps"
            )

    def time_uncached(self, seed: int | None = None) -> float:
        """One more timing of the uncached run; how near it comes to the one before with its seed, dB."""
        seed = self.seeds[0] if seed is None else seed
        self._timed.add(seed)

        def measured() -> dict[str, Any]:
            self.afford(1.0)
            made = self.generation.run(None, self.usual, seed)
            before = self._last.get(seed, made.pictures)
            self._last[seed] = made.pictures
            if self.many == self.usual:
                self._references.setdefault(seed, made.pictures)
            size = [len(made.pictures), *made.pictures[0].values.shape]
            near = str(psnr(made.pictures, before))
            return {"seconds": made.seconds, "psnr": near, "size": size}

        entry = self.remembered("uncached", measured)
        self.size = [int(n) for n in entry["size"]]
        self._uncached.append(float(entry["seconds"]))
        self.tick(1.0, "no cache")
        self._since = 0.0
        return float(entry["psnr"])

    def taken(self, steps: int) -> int:
        """How many steps the denoiser takes in a run of so many `num_inference_steps`."""
        if steps not in self._taken and self._taken.get(self.usual) == self.usual:
            self._taken[steps] = steps
        if steps not in self._taken:
            found = self.remembered(f"steps of {steps}", lambda: self._count(steps))
            self._taken[steps] = int(found["steps"])
            self.cost.see("", *found["shares"])
        return self._taken[steps]

    def _count(self, steps: int) -> dict[str, Any]:
        outcome = self.generation.run(Recipe(Interval(2)), steps, self.seeds[0])
        if not outcome.calls:
            raise ValueError(
                "tune: generate made no call of target; it has to run the very model or pipeline that tune is given"
            )
        return {"steps": outcome.steps, "shares": self._shares(outcome)}

    def _shares(self, made: Outcome) -> list[float | None]:
        """What a reused step takes of a computed one, and all besides steps of all calls of a step."""
        if made.shares is None or not made.steps:
            return []
        return [made.shares.reuse, made.shares.rest * made.steps / made.calls]

    def _reference(self, seed: int) -> list[Picture]:
        if seed not in self._references:
            self.afford(self.many / self.usual)
            self._references[seed] = self.generation.run(None, self.many, seed).pictures
            self.tick(self.many / self.usual, REFERENCE)
        return self._references[seed]

    def converged_to(self) -> float:
        """How near a run of half as many steps comes to the reference, dB: what the reference itself is worth."""
        half, seed = max(self.many // 2, 1), self.seeds[0]

        def measured() -> dict[str, Any]:
            self.afford(half / self.usual)
            made = self.generation.run(None, half, seed).pictures
            return {"psnr": str(psnr(made, self._reference(seed)))}

        found = float(self.remembered("half", measured)["psnr"])
        self.tick(half / self.usual, REFERENCE)
        return found

    # --- candidates -----------------------------------------------------------------------------------------

    def trial(self, candidate: Candidate) -> Trial:
        """What is known of a candidate, which may be nothing yet."""
        key = candidate.recipe, candidate.steps
        if key not in self.trials:
            self.trials[key] = Trial(candidate, self.taken(candidate.steps))
        return self.trials[key]

    def measure(self, candidate: Candidate, seed: int, again: bool = False) -> Trial:
        """Run a candidate with a seed, unless it was; with `again` for its time, in any case.

        Raises:
            OutOfTime: the limit leaves no room for it.
        """
        trial = self.trial(candidate)
        if trial.error or (seed in trial.psnr and not again):
            return trial
        if self._since >= EVERY:
            self.time_uncached()
        if self.many == self.usual and seed not in self._timed:
            self.time_uncached(seed)  # which is its reference too
        digest = "uncached" if candidate.recipe is None else candidate.recipe.digest().hex()[:32]
        entry = self.remembered(
            f"{digest} {candidate.steps} {seed}", lambda: self._measured(trial, seed)
        )
        trial.error = str(entry.get("error", ""))
        if not trial.error:
            self._note(trial, seed, entry)
        self.tick(self.expected(trial), candidate.name)
        self._since += self.expected(trial)
        return trial

    def _measured(self, trial: Trial, seed: int) -> dict[str, Any]:
        candidate = trial.candidate
        wanted = self._reference(seed)
        self.afford(self.expected(trial))
        try:
            made = self.generation.run(candidate.recipe, candidate.steps, seed)
        except Exception as error:
            if candidate.recipe is None:
                raise  # without a cache: an error of generate's own
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        return self._values(made, trial, wanted)

    def _values(self, made: Outcome, trial: Trial, wanted: list[Picture]) -> dict[str, Any]:
        share = made.computed / made.calls if made.calls else 1.0
        return {
            "psnr": str(psnr(made.pictures, wanted)),
            "ratio": made.seconds / self.base,
            "computed": share * trial.taken,
            "marks": [int(m) for m in made.marks],
            "shares": self._shares(made),
        }

    def _note(self, trial: Trial, seed: int, entry: dict[str, Any]) -> None:
        trial.psnr[seed] = float(entry["psnr"])
        trial.ratios.append(float(entry["ratio"]))
        trial.computed = float(entry["computed"])
        trial.marks = tuple(map(bool, entry["marks"]))
        reused = trial.taken - trial.computed
        self.cost.note(trial.candidate.kind, trial.computed, reused, trial.ratios[-1])
        self.cost.see(trial.candidate.kind, *entry["shares"])

    def expected(self, trial: Trial) -> float:
        """The cost of a candidate's run, as a share of the uncached one, by what all runs say."""
        if trial.candidate.recipe is None:
            return self.cost.of("", trial.taken, 0)
        computed = trial.computed or trial.taken / 2
        return self.cost.of(trial.candidate.kind, computed, trial.taken - computed)

    def planned(self, candidate: Candidate) -> float:
        """The cost of a candidate whose plan is known before step 0; of another that of computing half."""
        taken, recipe = self.taken(candidate.steps), candidate.recipe
        assert recipe is not None
        try:
            computed = len(recipe.plan(taken).computed)
        except ValueError:  # it decides while it runs
            computed = taken // 2
        return self.cost.of(candidate.kind, computed, taken - computed)

    def uncached_usual(self) -> Trial:
        """The uncached run itself, whose time is 1 and which may be the reference."""
        trial = self.trial(without(self.usual))
        trial.computed, trial.ratios = trial.taken, [1.0]
        for seed in self.seeds if self.many == self.usual else ():
            trial.psnr[seed] = math.inf
        return trial

    # --- time and the journal ---------------------------------------------------------------------------------

    def remembered(self, key: str, make: Any) -> dict[str, Any]:
        """What `make` gives, or what it gave in an earlier sitting: an object of plain values."""
        found = self.journal.take(key)
        if found is None:
            found = make()
            self.journal.add(key, found, round(self.elapsed, 3))
        return found

    def tick(self, cost: float, name: str) -> None:
        """Say that a run is over, and what it cost."""
        self.spent += cost if name != REFERENCE else 0.0
        self._tell(cost, name)

    def afford(self, cost: float) -> None:
        if self.limit is not None and self.elapsed + cost * self.base > self.limit:
            raise OutOfTime
