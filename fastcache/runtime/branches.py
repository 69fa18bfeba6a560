# SPDX-License-Identifier: Apache-2.0
"""Telling guidance branches apart where nobody opens a context.

A pipeline without contexts that runs guidance sequentially calls the model twice per step: at the same
timestep, under other conditions. Those are two branches, and each needs its own state. A call is known by the
conditions that stay what they were over a run; on a device only identity counts, since comparing would wait.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import sync

MOST = 8  # branches told apart


class Fact(NamedTuple):
    """A value and how often it had been written to; what is known of a device's tensor keeps it not alive."""

    held: Any
    version: int
    weak: bool = False

    @property
    def value(self) -> Any:
        return self.held() if self.weak else self.held


class BranchDetector:
    """Which branch each call without a context belongs to.

    unclear: nothing tells which branch the latest call was, so it must compute and no other may use its values.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._step: list[Fact] = []  # latents and timestep of the running step
        self._used: list[int] = []  # branches seen in it
        self._known: list[list[Fact]] = []  # conditions of each branch
        self._past: list[list[Fact]] = []  # of the branches of the run before
        self._replaced: list[Fact] | None = None  # by those of the latest call
        self._changing: list[
            set[int]
        ] = []  # of each branch, places of those that are others in every step
        self._changed: tuple[int, set[int]] = (0, set())  # by the latest call, if its run went on
        self._steady = False  # one branch, and the conditions of the latest call were those before
        self.unclear = False

    def of(
        self, latents: Any, timestep: Any, conditions: list[Any], again: bool | None = None
    ) -> int:
        """0 for the first branch of a step; the same conditions keep their number over the run.

        again: whether this call belongs to the step of the one before; None where latents and timestep must tell.
        """
        step = [_fact(latents, alive=True), _fact(timestep, alive=True)]
        if self._steady and self._same_objects(latents, conditions):
            self.unclear, self._step, self._used = False, step, [0]
            return 0
        facts = [_fact(leaf) for leaf in (_shape(latents), *_leaves(conditions))]
        known, self.unclear = self._known, False
        self._learn()
        exact = next((i for i, k in enumerate(known) if _same(k, facts)), None)
        number, sure = exact, True
        if exact is None:
            number, sure = self._find(facts, self._used if again else [])
        if again is None:
            again = bool(self._used) and _same(step, self._step)
            if not again and number is None and self._used:
                # latents that cannot be compared, at the very timestep of the call before, under conditions
                # never seen: taken for another branch, which at worst computes what could have been reused
                again = _incomparable(step[0], self._step[0]) and _equal(step[1], self._step[1])
        if not again:
            self._used = []
        self._step = step
        if number is None:
            free = (i for i in range(MOST) if i not in self._used)
            number = next(free, MOST) if again else 0
            # a run with one branch may change its conditions as it goes on; with several, nothing tells which
            # this is, unless it is one more; nor is it the run that goes on where conditions of the last come back
            more = len(known) > 1 and not (again and number >= len(known))
            self.unclear = more or (not again and self._returns(facts))
        if exact is None and number < len(known) and not self.unclear:
            pairs = enumerate(zip(known[number], facts, strict=False))
            self._changed = number, {i for i, (old, new) in pairs if not _equal(old, new)}
        elif exact is not None:
            self._changed = exact, set()
        self.unclear = self.unclear or not sure
        self._replaced = known[number] if number < len(known) else None
        known[number : number + 1] = [facts]
        if number == len(self._changing):
            self._changing.append(set())
        if number not in self._used:
            self._used.append(number)
        self._steady = exact == 0 and len(known) == 1 and not self._changing[0]
        return number

    def _same_objects(self, latents: Any, conditions: list[Any]) -> bool:
        """Whether the very conditions of the call before came again, and nobody has written into them."""
        shape, *facts = self._known[0]
        if len(facts) != len(conditions) or shape.held != _shape(latents):
            return False
        for fact, value in zip(facts, conditions, strict=True):
            if fact.value is not value or (fact.weak and value is None):
                return False
            if isinstance(value, Tensor) and fact.version != _version(value):
                return False
        return True

    def began(self, number: int) -> None:
        """Note that another run began with the latest call, which is of this branch."""
        known, self._changed = self._known, (0, set())
        others = [facts for i, facts in enumerate(known) if i != number]
        self._past = others if self._replaced is None else [self._replaced, *others]
        del known[number + 1 :]
        del self._changing[number + 1 :]

    def _learn(self) -> None:
        """The run went on after the latest call: what has changed in it may do so in every step."""
        number, changed = self._changed
        if number < len(self._changing):
            self._changing[number] = changed
        self._changed = len(self._changing), set()

    def _find(self, facts: list[Fact], used: list[int]) -> tuple[int | None, bool]:
        """The branch that a call looks like, by conditions that last, while nothing speaks for another one.

        Returns it, and whether nothing else can be meant: all other conditions are known to change.
        used: branches of this step, which come no second time.
        """
        known = [(i, k) for i, k in enumerate(self._known) if len(k) == len(facts)]
        alike = [(i, [_equal(a, b) for a, b in zip(k, facts, strict=True)]) for i, k in known]
        for i, marks in alike:
            others = [m for j, m in alike if j != i]
            if i not in used and others and all(self._rather(marks, m) for m in others):
                return i, all(m or at in self._changing[i] for at, m in enumerate(marks))
        return None, True

    def _rather(self, these: Sequence[bool], those: Sequence[bool]) -> bool:
        """Whether lasting conditions speak for these and none for those."""
        changing = set().union(*self._changing)
        pairs = {
            (a, b) for i, (a, b) in enumerate(zip(these, those, strict=True)) if i not in changing
        }
        return (True, False) in pairs and (False, True) not in pairs

    def _returns(self, facts: list[Fact]) -> bool:
        """Whether a call looks like the run before, not like the one that goes on."""
        now = (
            [_equal(a, b) for a, b in zip(self._known[0], facts, strict=False)]
            if self._known
            else []
        )
        return any(
            len(now) == len(past) == len(facts)
            and self._rather([_equal(a, b) for a, b in zip(past, facts, strict=True)], now)
            for past in self._past
        )


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _incomparable(now: Fact, before: Fact) -> bool:
    """Whether both are tensors whose values only the device knows."""
    a, b = now.value, before.value
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a is b:
        return False
    return a.shape == b.shape and a.device == b.device and a.device.type != "cpu"


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        elif isinstance(value, dict):
            yield from _leaves(value.values())
        else:
            yield value


def _fact(value: Any, alive: bool = False) -> Fact:
    """What is known of a value. alive: whether it is kept, on a device too."""
    if not isinstance(value, Tensor):
        return Fact(value, 0)
    version = _version(value)
    if alive or value.device.type == "cpu":
        return Fact(value, version)
    return Fact(weakref.ref(value), version, True)


def _version(value: Tensor) -> int:
    """How often it was written into; 0 where that is not counted."""
    return 0 if value.is_inference() else value._version


def _same(before: list[Fact], now: list[Fact]) -> bool:
    return len(before) == len(now) and all(map(_equal, before, now))


def _equal(before: Fact, now: Fact) -> bool:
    a = before.held() if before.weak else before.held
    b = now.held() if now.weak else now.held
    if a is b:
        return before.version == now.version and not (a is None and before.weak)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # on an accelerator only identity counts: comparing would wait for the device
        written = not a.is_inference() and a._version != before.version
        host = a.device.type == b.device.type == "cpu" and a.dtype == b.dtype
        return not written and host and sync.same(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    try:
        return bool(a == b)
    except Exception:  # an argument whose comparison fails is another argument
        return False
