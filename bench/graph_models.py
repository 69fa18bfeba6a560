# SPDX-License-Identifier: Apache-2.0
"""The models of the graphs benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from . import common
from .common import ROOT

RUNS = 3

Calls = list[dict[str, Any]]


def of_diffusers(name: str, steps: int) -> tuple[nn.Module, Calls]:
    tiny = common.load_file("tiny", ROOT / "tests" / "tiny.py")
    model, inputs = tiny.build(name)
    calls = tiny.trajectory(name, inputs, steps)
    return model, [{**call, "return_dict": False} for call in calls]


def of_a_user(name: str, steps: int) -> tuple[nn.Module, Calls]:
    """Blocks with attention to themselves and to text, in one list, of no class that anyone knows."""
    toys = common.load_file("toys", ROOT / "tests" / "toys.py")
    return toys.Model(block=toys.Optional), toys.inputs(steps, text=True, speed=0.02)


Make = Callable[[str, int], tuple[nn.Module, Calls]]


# how a model is made, and the threshold at which FirstBlockCache reuses somewhat more than half its steps
MODELS: dict[str, tuple[Make, float]] = {
    "Flux": (of_diffusers, 0.3),
    "Wan3D": (of_diffusers, 0.1),
    "CogVideoX": (of_diffusers, 0.1),
    "LTX": (of_diffusers, 0.07),
    "QwenImage": (of_diffusers, 0.4),
    "plain": (of_a_user, 0.1),
}


@dataclass
class Runs:
    """What came out of each call, its seconds, and how many graphs there were after it."""

    outputs: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)

    def steady(self) -> float:
        """Seconds of the last run."""
        return sum(self.seconds[-(len(self.seconds) // RUNS) :])

    def difference(self, other: Runs) -> float:
        pairs = zip(self.outputs, other.outputs, strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)
