# SPDX-License-Identifier: Apache-2.0
"""The running step as it was decided, and the only object that traced code reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..policies import COMPUTE, Decision, Step

PENDING = "pending"  # the action of a rule that decides after the first block has run


PENDING_DECISION = Decision(PENDING)  # type: ignore[arg-type]  # a placeholder until then


# Phases of a step: all of it in one pass, or (compiled) its first block and then what follows.
WHOLE, HEAD, REST = "whole", "head", "rest"


class Prepares(Protocol):
    """A target, as far as a step begins with it."""

    def begin(self) -> bool:
        """Get ready for the model's forward; returns whether storage exists."""


class StepControl:
    """What a step is: its state, its decisions and their weights, one of each per rule.

    active: targets take part in the model's forward. signature_missed: traced code met a shape it has no storage for.
    may_be_compiled: some of the model may be compiled, so actions hold for all modules of a rule alike.
    inside: the model's forward is running in a call of ours. members: samples with a state each that the call holds, 0
    where one state is all of it. predicted: values of stacks that this step has
    predicted so far, where nothing is compiled.
    """

    __slots__ = (
        "actions",
        "active",
        "batch",
        "decisions",
        "inside",
        "may_be_compiled",
        "members",
        "phase",
        "predicted",
        "seen",
        "signature_missed",
        "state",
        "step",
        "weights",
    )

    def __init__(self) -> None:
        self.active = self.signature_missed = self.may_be_compiled = self.inside = False
        self.phase = WHOLE
        self.predicted = self.members = 0
        self.seen: Any = None  # the timestep that the model was called with, inside a graph
        self.state: Any = None  # the State of the running call
        self.step = Step(0)
        self.batch = "full"  # "half" while the unconditional half is skipped
        self.decisions: list[Decision] = []
        self.actions: list[str] = []  # those of the decisions, for traced code
        self.weights: list[tuple[float, ...]] = []  # of a reused value's history

    @property
    def computes(self) -> bool:
        """Whether it was decided that every rule computes this step."""
        return all(action == COMPUTE for action in self.actions)

    def hold(self, rules: int) -> None:
        """Have room for the decisions of so many rules."""
        self.decisions = [Decision(COMPUTE)] * rules
        self.actions = [COMPUTE] * rules
        self.weights = [()] * rules

    def begin_step(self, targets: Sequence[Prepares]) -> bool:
        """Put the targets in charge of the model's forward, for the step that these fields describe.

        Returns whether all storage exists: compiled code may run then, and nothing is recorded.
        """
        recorded, self.predicted = True, 0
        for target in targets:
            if not target.begin():
                recorded = False
        self.active = True
        return recorded

    def end_step(self) -> None:
        """Let the model's own forward run again."""
        self.active = False

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """A step of another kind runs inside: afterwards all is as it was."""
        before = {name: getattr(self, name) for name in self.__slots__}
        lists = {name: list(value) for name, value in before.items() if isinstance(value, list)}
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)
            for name, items in lists.items():
                before[name][:] = items


class Stop(Exception):
    """Leaves the model's forward after its first block, in the head region of a compiled step."""
