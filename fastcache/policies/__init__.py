"""When to reuse: pure Python on host numbers, no torch."""

from .base import COMPUTE, REUSE, Action, Decision, Policy, Run, Step
from .first_block import FirstBlock
from .magnitude import Calibrate, Magnitude
from .masks import steps_mask
from .misfit import Misfit
from .schedule import Broadcast, Growing, Interval, Mask, TimestepRange

__all__ = [
    "COMPUTE",
    "REUSE",
    "Action",
    "Broadcast",
    "Calibrate",
    "Decision",
    "FirstBlock",
    "Growing",
    "Interval",
    "Magnitude",
    "Mask",
    "Misfit",
    "Policy",
    "Run",
    "Step",
    "TimestepRange",
    "steps_mask",
]
