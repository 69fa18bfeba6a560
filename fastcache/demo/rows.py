# SPDX-License-Identifier: Apache-2.0
"""What the demo runs and what it measures: one row per method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .methods import Method


@dataclass
class Run:
    """What was measured for one method."""

    method: Method
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    blocks: list[int] = field(default_factory=list)  # transformer blocks that ran, per step
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One line of the table and of the JSON file."""

    name: str
    family: str
    predictor: str  # "reuse", "order 1", ...; empty where nothing is predicted
    guidance: float | None
    steps: int
    computed_steps: int  # steps in which every block ran
    blocks: list[int]  # transformer blocks that ran, per step
    compute: float  # blocks computed, as a share of the uncached run
    seconds: float
    speedup: float
    psnr: float | None  # against the uncached run; None when identical
    relative_l2: float
    ssim: float
    accuracy: float
    fewer_steps_psnr: float | None  # the uncached model at fewer steps and the same compute

    @property
    def gain(self) -> float | None:
        """PSNR in dB above fewer steps at equal compute."""
        if self.psnr is None or self.fewer_steps_psnr is None:
            return None
        return self.psnr - self.fewer_steps_psnr


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on besides the machine."""

    steps: int = 28
    batch: int = 16
    seed: int = 0
    rounds: int = 3
    budget: float = 60.0  # seconds; a round that would not fit is left out


def reference_of(run: Run, runs: list[Run]) -> Run:
    """The uncached run at full length with the same guidance."""

    def key(method: Method) -> tuple[float | None, bool]:
        return method.guidance, method.batched_guidance

    for other in runs:
        if other.method.is_reference and key(other.method) == key(run.method):
            return other
    raise ValueError(f"demo row {run.method.name!r}: no uncached row with the same guidance")
