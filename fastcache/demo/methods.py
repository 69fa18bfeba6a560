"""What the demo compares: one row per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastcache import (
    FirstBlock,
    FirstBlockCacheConfig,
    Interval,
    MagCacheConfig,
    Magnitude,
    Recipe,
    Stack,
    Taylor,
)

REUSE = "reuse"
ORDER_1 = "order 1"


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


def methods(steps: int, mag_ratios: Sequence[float]) -> list[Method]:
    """The rows for runs of `steps` steps, with MagCache calibrated to `mag_ratios`."""

    def first_block(threshold: float, pictured: bool) -> list[Method]:
        name = f"FirstBlock {threshold:.2f}"
        reuse = FirstBlockCacheConfig(threshold=threshold)
        order_1 = Recipe(when=FirstBlock(threshold), what=Taylor(order=1), where=Stack())
        return [
            Method(name, "FirstBlock", REUSE, reuse, pictured=pictured),
            Method(name, "FirstBlock", ORDER_1, order_1, pictured=pictured),
        ]

    def magcache(threshold: float, pictured: bool) -> list[Method]:
        name = f"MagCache {threshold:.2f}"
        account = {
            "threshold": threshold,
            "num_inference_steps": steps,
            "mag_ratios": list(mag_ratios),
        }
        order_1 = Recipe(when=Magnitude(**account), what=Taylor(order=1), where=Stack())
        return [
            Method(name, "MagCache", REUSE, MagCacheConfig(**account), pictured=pictured),
            Method(name, "MagCache", ORDER_1, order_1, pictured=pictured),
        ]

    interval = Recipe(when=Interval(4), what=Taylor(order=1), where=Stack())
    half, third, quarter = (round(steps / n) for n in (2, 3, 4))
    return [
        Method("uncached", "uncached", pictured=True),
        Method(f"{half} steps", "fewer steps", steps=half),
        Method(f"{third} steps", "fewer steps", steps=third, pictured=True),
        Method(f"{quarter} steps", "fewer steps", steps=quarter),
        *first_block(0.10, pictured=False),
        *first_block(0.20, pictured=True),
        *magcache(0.12, pictured=False),
        *magcache(0.24, pictured=True),
        Method("every 4th step", "Interval", ORDER_1, interval, pictured=True),
    ]
