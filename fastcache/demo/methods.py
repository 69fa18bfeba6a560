# SPDX-License-Identifier: Apache-2.0
"""What the demo compares: one row per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import (
    Extrapolate,
    FirstBlock,
    Guidance,
    Guided,
    Interval,
    Magnitude,
    Modules,
    PyramidAttentionBroadcastConfig,
    Recipe,
    Reuse,
    Stack,
    Taylor,
    TaylorSeerCacheConfig,
    TimestepRange,
    preset,
)
from ..policies import Policy

REUSE = "reuse"
ORDER_1 = "order 1"
GUIDED = "guided"
SCALE = 2.5  # classifier-free guidance
BUDGETS = dict.fromkeys(("quality", "balanced", "fast"), GUIDED)
GRID = (8, 8)  # tokens of an image of the shipped model


@dataclass(frozen=True)
class Method:
    """One row of the table. `config` is what `fastcache.enable` takes; None runs uncached."""

    name: str
    family: str
    predictor: str = ""
    config: object | None = None
    steps: int | None = None  # None: as many as the uncached reference
    guidance: float | None = None
    batched_guidance: bool = False
    pictured: bool = False  # gets a line of samples in the picture

    @property
    def is_reference(self) -> bool:
        """Uncached, at full length: what other rows are compared with."""
        return self.config is None and self.steps is None


def methods(steps: int, mag_ratios: Sequence[float]) -> list[Method]:
    """The rows for runs of `steps` steps, with MagCache calibrated to `mag_ratios`.

    Both predictors of a rule get the same guards, so that they compute the same number of steps:
    the first four, which a forecast needs, and the last.
    """

    def both(name: str, family: str, when: Policy, pictured: bool = False) -> list[Method]:
        return [
            Method(
                name, family, label, Recipe(when=when, what=what, where=Stack()), pictured=pictured
            )
            for label, what in ((REUSE, Reuse()), (ORDER_1, Taylor(order=1)))
        ]

    def first_block(threshold: float) -> FirstBlock:
        return FirstBlock(threshold, warmup=4, last=True)

    def magnitude(threshold: float) -> Magnitude:
        return Magnitude(
            threshold,
            num_inference_steps=steps,
            mag_ratios=tuple(mag_ratios),
            warmup=4,
            last=True,
        )

    interval = Recipe(when=Interval(4, warmup=4, last=True), what=Taylor(order=1), where=Stack())
    guided = Recipe(when=Interval(4, warmup=4, last=True), what=Guided(order=2), where=Stack())
    pab = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: None
    )
    faster = Recipe(TimestepRange(2, (-1, 681)), Extrapolate(0.3), Modules())
    # the unconditional half is rebuilt on 4 of 5 steps, and attention on every other of those
    half = Recipe(TimestepRange(5, (-1, 641)), Reuse(), Guidance(tensor_format="BSC", grid=GRID))
    attention = Recipe(
        TimestepRange(2, (-1, 681), conditional_only=True), Extrapolate(0.3), Modules()
    )
    one_half, one_third, one_quarter = (round(steps / n) for n in (2, 3, 4))
    return [
        Method("uncached", "uncached", pictured=True),
        Method(f"{one_half} steps", "fewer steps", steps=one_half),
        Method(f"{one_third} steps", "fewer steps", steps=one_third, pictured=True),
        Method(f"{one_quarter} steps", "fewer steps", steps=one_quarter),
        *both("FirstBlock 0.10", "FirstBlock", first_block(0.10)),
        *both("FirstBlock 0.20", "FirstBlock", first_block(0.20), pictured=True),
        *both("MagCache 0.12", "MagCache", magnitude(0.12)),
        *both("MagCache 0.24", "MagCache", magnitude(0.24), pictured=True),
        Method("every 4th step", "Interval", ORDER_1, interval),
        Method("every 4th step", "Interval", GUIDED, guided),
        *(
            Method(f"preset {name}", "presets", label, preset(name), pictured=name == "balanced")
            for name, label in BUDGETS.items()
        ),
        Method("TaylorSeer 4", "TaylorSeer", ORDER_1, TaylorSeerCacheConfig(cache_interval=4)),
        Method("PAB 2", "PAB", REUSE, pab),
        Method("FasterCache 2", "FasterCache", "extrapolate", faster),
        Method("guidance 2.5", "uncached", guidance=SCALE),
        Method("guidance 2.5, batched", "uncached", guidance=SCALE, batched_guidance=True),
        Method("guidance, PAB 2", "PAB", REUSE, pab, guidance=SCALE),
        Method(
            "guidance, FasterCache 5",
            "FasterCache",
            "extrapolate",
            half + attention,
            guidance=SCALE,
            batched_guidance=True,
        ),
        Method("guidance, balanced", "presets", GUIDED, preset("balanced"), guidance=SCALE),
    ]
