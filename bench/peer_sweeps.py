# SPDX-License-Identifier: Apache-2.0
"""Settings of the peers, and of ours that imitate them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import fastcache

from . import systems
from .points import Point, ours, theirs
from .subjects import Cell
from .systems import Attached

FIRST_BLOCK = (0.08, 0.12, 0.15, 0.20, 0.30, 0.40)


MAGNITUDE = (0.06, 0.12, 0.18, 0.24, 0.36, 0.50)


LASTS = (1, 2, 5)  # how many last steps peers compute where we choose for them
# first steps and last ones of upstream; None is its default
ENDS = (*((None, last) for last in LASTS), (2, 0), (2, 2), (4, 0), (4, 1))


SEER_INTERVALS = (3, 4, 5, 6)


BROADCAST = (2, 3)


# Fields of TaylorSeer's lite mode, which forecasts `proj_out`; spelled out where that has another name, and the mode as
# it is would leave the blocks out and forecast nothing.
LITE: dict[str, dict[str, Any]] = {
    "dit": {
        "skip_predict_identifiers": [r"transformer_blocks\.\d+"],
        "cache_identifiers": ["proj_out_2"],
    }
}
LITE_USUAL = {"use_lite_mode": True}


DB_CACHE = (0.08, 0.12, 0.16, 0.20, 0.30)


def seer_schedule(steps: int, interval: int, before: int = 3) -> tuple[int, ...]:
    """1 for every step that TaylorSeerCacheConfig(cache_interval=interval) computes."""
    return tuple(int(i < before or (i - before - 1) % interval == 0) for i in range(steps))


def module_points(cell: Cell) -> Iterator[Point]:
    """Rules on modules, from the documented configs."""
    yield from _module_points(
        cell.model, lambda method, predictor, setting, name, **fields: ours(
            method, predictor, setting, getattr(fastcache, name)(**fields)
        )
    )  # fmt: skip


def diffusers_points(cell: Cell, ratios: Sequence[float]) -> Iterator[Point]:
    for t in FIRST_BLOCK:
        yield theirs("FirstBlock", "reuse", f"{t:g}", "FirstBlockCacheConfig", threshold=t)
    for t in MAGNITUDE:
        fields = {"num_inference_steps": cell.steps, "mag_ratios": torch.tensor(ratios)}
        yield theirs("MagCache", "reuse", f"{t:g}", "MagCacheConfig", threshold=t, **fields)
    yield from _module_points(cell.model, theirs)
    yield from _late_seers(cell)


def seer_points(cell: Cell) -> Iterator[Point]:
    """TaylorSeer of diffusers alone."""
    yield from (p for p in _module_points(cell.model, theirs) if p.method == "TaylorSeer")
    yield from _late_seers(cell)


def _late_seers(cell: Cell) -> Iterator[Point]:
    """The best of upstream, on the steps that serve ours best, and from other first steps than its default of three."""
    lite = LITE.get(cell.model, LITE_USUAL)
    for n in SEER_INTERVALS:
        for first, last in ENDS:
            ends = {"disable_cache_after_step": cell.steps - last} if last else {}
            if first is not None:
                ends["disable_cache_before_step"] = first
            name = f"lite, every {n}" + (f", first {first}" if first is not None else "")
            yield theirs(
                "TaylorSeer",
                "order 1",
                name + (f", last {last}" if last else ""),
                "TaylorSeerCacheConfig",
                cache_interval=n,
                taylor_factors_dtype=torch.float32,
                **ends,
                **lite,
            )


def _module_points(model: str, make: Callable[..., Point]) -> Iterator[Point]:
    """TaylorSeer, Pyramid Attention Broadcast and FasterCache, the same fields on either side."""
    fp32 = {"taylor_factors_dtype": torch.float32}
    lite = LITE.get(model, LITE_USUAL)
    for n in SEER_INTERVALS:
        for kind, fields in (("modules", {}), ("lite", lite)):
            setting = f"{kind}, every {n}"
            name = "TaylorSeerCacheConfig"
            yield make("TaylorSeer", "order 1", setting, name, cache_interval=n, **fp32, **fields)
    for n in BROADCAST:
        yield make(
            "PAB",
            "reuse",
            f"range {n}",
            "PyramidAttentionBroadcastConfig",
            spatial_attention_block_skip_range=n,
            current_timestep_callback=systems.now,
        )
    for n in BROADCAST:
        yield make(
            "FasterCache",
            "order 1",
            f"range {n}",
            "FasterCacheConfig",
            spatial_attention_block_skip_range=n,
            is_guidance_distilled=True,  # the attention half, on every kind of guidance
            current_timestep_callback=systems.now,
        )


def cache_dit_points(steps: int, separate_cfg: bool) -> Iterator[Point]:
    for order, label in ((0, "reuse"), (1, "order 1")):
        for t in DB_CACHE:
            yield _dbcache(steps, separate_cfg, label, f"{t:g}", order=order, threshold=t)
        for n in (3, 4, 5, 6):
            mask = [int(i < 4 or (i - 3) % n == 0 or i == steps - 1) for i in range(steps)]
            yield _dbcache(steps, separate_cfg, label, f"every {n}", order=order, mask=mask)
    for n in (2, 3, 4, 5, 6):  # on the steps that serve ours best
        for last in LASTS:
            mask = [int(i < 3 or (i - 1) % n == 0 or i >= steps - last) for i in range(steps)]
            setting = f"every {n}, early, last {last}"
            yield _dbcache(steps, separate_cfg, "order 1", setting, order=1, mask=mask, warmup=3)


def _dbcache(steps: int, separate_cfg: bool, predictor: str, setting: str, **fields: Any) -> Point:
    def attach(model: nn.Module) -> Attached:
        return systems.attach_cache_dit(model, steps=steps, separate_cfg=separate_cfg, **fields)

    return Point("cache-dit", "DBCache", predictor, setting, attach)
