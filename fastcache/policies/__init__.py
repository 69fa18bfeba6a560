"""When to reuse: pure Python on host numbers, no torch."""

from .base import COMPUTE, REUSE, Action, Decision, Policy, Run, Step
from .first_block import FirstBlock
from .magnitude import Calibrate, Magnitude
from .misfit import Misfit
from .schedule import Broadcast, Interval, Mask, TimestepRange

__all__ = [
    "COMPUTE",
    "REUSE",
    "Action",
    "Broadcast",
    "Calibrate",
    "Decision",
    "FirstBlock",
    "Interval",
    "Magnitude",
    "Mask",
    "Misfit",
    "Policy",
    "Run",
    "Step",
    "TimestepRange",
]
