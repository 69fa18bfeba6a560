# SPDX-License-Identifier: Apache-2.0
"""From what was measured to thresholds: any one is played through without another run.

`rows` are first-block changes of one context: row i holds the relative L1 change of the first block's
residual at step i against steps i-1, i-2, ...
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from ..checks import real
from ..policies import COMPUTE, FirstBlock, Magnitude, Step
from .errors import CalibrationError

Rows = Sequence[Sequence[float]]


def computed_steps(rows: Rows, threshold: float, **guards: Any) -> list[int]:
    """Steps that FirstBlock computes at a threshold. guards: other fields of `fastcache.FirstBlock`."""
    policy, computed = FirstBlock(threshold, **guards), list[int]()
    run = policy.begin(len(rows))
    for i, row in enumerate(rows):
        back = i - computed[-1] if computed else 0
        change = row[back - 1] if 0 < back <= len(row) else None
        if policy.decide(run, Step(i, len(rows)), change).action == COMPUTE:
            computed.append(i)
    return computed


def first_block_share(contexts: Collection[Rows], threshold: float, **guards: Any) -> float:
    """Share of steps that FirstBlock computes at a threshold, over all contexts."""
    computed = sum(len(computed_steps(rows, threshold, **guards)) for rows in contexts)
    return computed / sum(map(len, contexts))


def first_block_threshold(contexts: Collection[Rows], target: object, **guards: Any) -> float:
    """The smallest threshold at which FirstBlock computes at most this share of the steps."""
    target = _share(target)
    seen = sorted({change for rows in contexts for row in rows for change in row})
    for threshold in (0.0, *(_round_up(change) for change in seen if math.isfinite(change))):
        if first_block_share(contexts, threshold, **guards) <= target:
            return threshold
    least = first_block_share(contexts, math.ceil(seen[-1] + 1) if seen else 1.0, **guards)
    raise CalibrationError(
        f"calibration: target_fraction is {target:g}, but no threshold computes fewer than "
        f"{least:.0%} of the steps; ask for more, or lower warmup"
    )


def mag_share(ratios: tuple[float, ...], steps: int, threshold: float, **fields: Any) -> float:
    """Share of the steps that Magnitude computes at a threshold. fields: others of `fastcache.Magnitude`."""
    values = {"num_inference_steps": steps, "mag_ratios": ratios, **fields}
    policy = Magnitude(threshold, **values).guarded(warmup=0, max_skips=0, last=False)
    run = policy.begin(steps)
    actions = [policy.decide(run, Step(i, steps)).action for i in range(steps)]
    return actions.count(COMPUTE) / steps


def mag_threshold(ratios: tuple[float, ...], steps: int, target: object, **fields: Any) -> float:
    """The smallest threshold, on a grid, at which Magnitude computes at most this share of the steps."""
    target = _share(target)
    for i in range(1, 401):
        threshold = i / 100 if i <= 100 else 1.02 ** (i - 100)
        if mag_share(ratios, steps, threshold, **fields) <= target:
            return round(threshold, 4)
    raise CalibrationError(
        f"calibration: target_fraction is {target:g}, but no threshold computes fewer than "
        f"{mag_share(ratios, steps, 1e6, **fields):.0%} of the steps; raise max_skip_steps or lower "
        "retention_ratio"
    )


def _share(value: object) -> float:
    share = real("calibration", "target_fraction", value, 0.0)
    if not 0 < share <= 1:
        raise CalibrationError(f"calibration: target_fraction is {share:g}, must be in (0, 1]")
    return share


def _round_up(value: float) -> float:
    """The next number of four digits that is not below `value`."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return float(f"{math.ceil(value / scale - 1e-9) * scale:.6g}")
