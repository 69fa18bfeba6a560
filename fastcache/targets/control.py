"""What traced code reads, and nothing else."""

from __future__ import annotations

from typing import Any

from ..policies import COMPUTE, Decision

PENDING = "pending"  # the action of a rule that decides after the first block has run


AFTER_FIRST_BLOCK = Decision(PENDING)  # type: ignore[arg-type]  # a placeholder until then


class Control:
    """The only object that traced code reads: whether a call is armed, its state and the actions.

    armed: a call is prepared and its step not yet taken. missed: traced code met a shape it has no storage
    for. compiled: some of the model may be compiled, so actions hold for all modules of a rule alike.
    """

    __slots__ = ("actions", "armed", "batch", "compiled", "missed", "phase", "seen", "state")

    def __init__(self, rules: int) -> None:
        self.armed = self.missed = self.compiled = False
        self.phase = WHOLE
        self.seen: Any = None  # the timestep that the model was called with, inside a graph
        self.state: Any = None  # the State of the running call
        self.actions: list[str] = [COMPUTE] * rules
        self.batch = "full"  # "half" while the unconditional half is skipped


# Phases of a step: all of it in one pass, or (compiled) its first block and then what follows.
WHOLE, HEAD, REST = "whole", "head", "rest"


class Stop(Exception):
    """Leaves the model's forward after its first block, in the head region of a compiled step."""
