# SPDX-License-Identifier: Apache-2.0
"""A recipe: when to reuse, what stands in, where; and its plan of a run, where that is known beforehand."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as field_of
from itertools import permutations
from pathlib import Path
from typing import Any

from .checks import whole
from .files import FileError
from .made_for import MADE_FOR, MadeFor
from .misfits import refuse_misfits
from .parts import FILE, NEEDED, rows_of, rules_in
from .plan import Plan
from .policies import COMPUTE, REUSE, Action, Policy, Step
from .predictors import Predictor, Reuse
from .targets.spec import Stack, Target

# What a forecast needs that plain reuse does not, measured on the shipped model (docs/architecture.md).
FORECAST_GUARDS = {"warmup": 4, "max_skips": 0, "last": True}
REUSE_GUARDS = {"warmup": 0, "max_skips": 0, "last": False}


def guards_of(what: Predictor) -> dict[str, Any]:
    """The guards that a policy takes where it leaves them open, by what predicts."""
    return FORECAST_GUARDS if what.forecasts else REUSE_GUARDS


@dataclass(frozen=True)
class Rule:
    """One row of a recipe.

    Args:
        when: a policy, with its guards set.
        what: a predictor.
        where: a target.
    """

    when: Policy
    what: Predictor
    where: Target


@dataclass(frozen=True, init=False)
class Recipe:
    """When × what × where. Recipes add up: `a + b` applies both to one model.

    Guards left at None on the policy become a warm-up of 4 computed steps and a computed last step for
    a predictor that forecasts, and none for plain reuse.

    Args:
        when: a policy, such as `FirstBlock`, `Magnitude`, `Interval`, `TimestepRange` or `Mask`.
        what: a predictor, such as `Taylor`; None: `Reuse()`.
        where: a target, `Stack`, `Output`, `Modules` or `Guidance`; None: `Stack()`.
    Raises:
        TypeError: an argument is of another kind; the message names it.
        ValueError: the three do not go together; the message says why.
    Source: the guards of forecasts are measured on the shipped model (docs/architecture.md).
    """

    rules: tuple[Rule, ...]
    name: str
    made_for: MadeFor | None = field_of(default=None, compare=False, repr=False)

    def __init__(
        self, when: Policy, what: Predictor | None = None, where: Target | None = None
    ) -> None:
        what, where = what if what is not None else Reuse(), where if where is not None else Stack()
        for field, value, kind, example in (
            ("when", when, Policy, "fastcache.FirstBlock(0.1)"),
            ("what", what, Predictor, "fastcache.Taylor(order=1)"),
            ("where", where, Target, "fastcache.Stack()"),
        ):
            if not isinstance(value, kind):
                raise TypeError(
                    f"Recipe: {field} is {value!r}, must be a {kind.__name__} such as {example}"
                )
        refuse_misfits(when, what, where)
        object.__setattr__(self, "rules", (Rule(when.guarded(**guards_of(what)), what, where),))
        object.__setattr__(self, "name", "Recipe")
        object.__setattr__(self, "made_for", None)

    @property
    def when(self) -> Policy:
        """The policy of the first rule."""
        return self.rules[0].when

    @property
    def what(self) -> Predictor:
        """The predictor of the first rule."""
        return self.rules[0].what

    @property
    def where(self) -> Target:
        """The target of the first rule."""
        return self.rules[0].where

    def __add__(self, other: Recipe) -> Recipe:
        if not isinstance(other, Recipe):
            return NotImplemented
        return Recipe.of((*self.rules, *other.rules), self.name)

    @classmethod
    def of(
        cls, rules: Sequence[Rule], name: str = "Recipe", made_for: MadeFor | None = None
    ) -> Recipe:
        """A recipe of several rules, taken as they are: no guard is filled in.

        Args:
            rules: at least one; a rule for guidance is moved to the front.
            name: what summaries and pictures call the recipe.
            made_for: what it was found on; None: nothing in particular.
        Returns:
            The recipe.
        Raises:
            ValueError: there is no rule, a rule makes no sense, or the rules cannot share a model.
        """
        for rule in rules:
            refuse_misfits(rule.when, rule.what, rule.where)
        if not rules:
            raise ValueError("Recipe: no rule, give at least one when × what × where")
        for one, other in permutations((rule.where for rule in rules), 2):
            if other.scope in one.excludes:
                raise ValueError(f"Recipe: where: {one.excludes[other.scope]}")
        # the guidance rule decides first: the others see only the conditional half where it skips
        rules = sorted(rules, key=lambda rule: not rule.where.halves)
        recipe = object.__new__(cls)
        object.__setattr__(recipe, "rules", tuple(rules))
        object.__setattr__(recipe, "name", name)
        object.__setattr__(recipe, "made_for", made_for)
        return recipe

    # --- files --------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values.

        Returns:
            An object with `format`, `version`, `name` and `rules`, and `made_for` where that is known.
        Raises:
            ValueError: a field holds what no file can, such as a function, or a class is not registered (see
                `fastcache.register_part`); the message names it.
        """
        values = rows_of(self.rules, self.name)
        if self.made_for is not None:
            values[MADE_FOR] = asdict(self.made_for)
        if Recipe.from_dict(values) != self:
            raise FileError("recipe: a field is changed by a file: give tuples, not lists")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that plain JSON values mean.

        Args:
            values: what `to_dict` returns. Guards that are left out are filled in as `Recipe` does; keys beside
                those of a recipe are not read.
        Returns:
            The recipe, equal to the one that was written.
        Raises:
            ValueError: what is wrong and where; the values are not quoted.
        """
        return cls._read(FILE.check(values, *NEEDED))

    def save(self, path: str | Path) -> Path:
        """Write the recipe as JSON.

        Args:
            path: of the file; `fastcache.enable` takes it where it ends in ".json".
        Returns:
            The path.
        Raises:
            ValueError: as `to_dict`.
            OSError: the file cannot be written.
        """
        return FILE.save(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        Args:
            path: of a JSON file that `save` wrote.
        Returns:
            The recipe, equal to the one that was saved.
        Raises:
            ValueError: what is wrong with the file; for a missing one it is a FileNotFoundError too.
        """
        return FILE.load(Path(path), cls._read, *NEEDED)

    @classmethod
    def _read(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that a file's object means, each field of it checked."""
        name, rows = rules_in(values)
        rules = []
        for (when, what, where), given in rows:
            guards = {k: v for k, v in guards_of(what).items() if k not in given}
            rules.append(Rule(when.guarded(**guards), what, where))
        try:
            return cls.of(rules, name, MadeFor.read(values.get(MADE_FOR)))
        except FileError:
            raise
        except ValueError as error:  # a reason of ours, in which nothing of the file stands
            raise FileError(f"recipe: {str(error).removeprefix('Recipe: ')}") from None

    @property
    def needs_signal(self) -> bool:
        """Whether a decision reads the device."""
        return any(r.when.needs_signal for r in self.rules)

    @property
    def decides_inside(self) -> bool:
        """Whether a decision falls inside the model's forward."""
        return any(r.when.decides_inside for r in self.rules)

    def digest(self, *facts: Any) -> bytes:
        """A hash that ranks can compare; callables count by name.

        Args:
            facts: anything else that the ranks must agree on, by its repr.
        Returns:
            32 bytes, SHA-256.
        """
        text = re.sub(" at 0x[0-9a-fA-F]+", "", repr((self.rules, facts)))
        return hashlib.sha256(text.encode()).digest()

    def plan(self, num_inference_steps: int, timesteps: Sequence[float] | None = None) -> Plan:
        """The whole schedule before step 0.

        Args:
            num_inference_steps: denoiser calls per context, n.
            timesteps: the n timesteps of the run, in the model's scale, for rules that decide on them;
                None: evenly spaced from 1000 down to 1000 / n.
        Returns:
            The action of every rule on every step.
        Raises:
            TypeError: `num_inference_steps` is no whole number.
            ValueError: it is below 1, `timesteps` has another length, or a rule decides on data of the run.
        """
        n = whole("plan", "num_inference_steps", num_inference_steps, 1)
        for rule in self.rules:
            if rule.when.needs_signal:
                seen = (
                    "what the first block returns"
                    if rule.when.runs_first_block
                    else "data of the run"
                )
                raise ValueError(
                    f"plan: {type(rule.when).__name__} decides on {seen}, so its schedule "
                    "exists only after the run; see cache.stats"
                )
        times = (
            list(timesteps) if timesteps is not None else [1000.0 * (n - i) / n for i in range(n)]
        )
        if len(times) != n:
            raise ValueError(
                f"plan: timesteps has {len(times)} entries for num_inference_steps={n}"
            )
        runs = [rule.when.begin(n) for rule in self.rules]
        rows: list[list[Action]] = [[] for _ in self.rules]
        computed = [0] * len(self.rules)
        for i in range(n):
            skipped = False
            for k, rule in enumerate(self.rules):
                step = Step(i, n, times[i], None, skipped)
                action = rule.when.decide(runs[k], step).action
                if action == REUSE and computed[k] < rule.what.needs:
                    rule.when.computed(runs[k], step)
                    action = COMPUTE
                computed[k] += action == COMPUTE
                rows[k].append(action)
                skipped |= rule.where.halves and action == REUSE
        return Plan(tuple(map(tuple, rows)), tuple(_label(r) for r in self.rules))


def _label(rule: Rule) -> str:
    return f"{type(rule.when).__name__} x {type(rule.what).__name__} x {type(rule.where).__name__}"
