# SPDX-License-Identifier: Apache-2.0
"""cache-dit's configs, adapters and patterns as recipes and block adapters of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ...configs import DBCacheConfig
from ...models.adapter import ENCODER, HIDDEN, Block, BlockAdapter
from ...models.registry import adapter_for
from ...models.table import BLOCKS
from ...predictors import DMD, Predictor, Taylor
from ...predictors.taylor import latest_gap_weights, steps_back
from ...recipe import Recipe

DIFFERENCES = 3  # the first step after which cache-dit's calibrator takes differences
FIELDS = tuple(DBCacheConfig.__dataclass_fields__)


@dataclass(frozen=True)
class LateTaylor(Taylor):
    """TaylorSeer as cache-dit has it: no difference is taken before the fourth step of a run."""

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """Of the values computed from there on, and of the one before.

        Args:
            steps: of the values, newest first.
            step: to forecast.
        Returns:
            A weight per value that counts.
        """
        return late_weights(steps, step)


@lru_cache(maxsize=4096)
def late_weights(steps: tuple[int, ...], step: int) -> tuple[float, ...]:
    """Taylor's weights of the values computed at those of these steps, newest first, from which cache-dit takes
    differences, and at the one before."""
    late = sum(computed >= DIFFERENCES for computed in steps)
    counting = steps[: late + 1]
    return latest_gap_weights(steps_back(counting), step - counting[0])


class Elsewhere(ValueError):
    """What has no counterpart here, and runs in cache-dit itself."""


def recipe_of(kwargs: dict[str, Any]) -> Recipe:
    """The recipe that the context of a block list stands for.

    Args:
        kwargs: of cache-dit's context: `cache_config`, `calibrator_config`.
    Returns:
        A recipe.
    Raises:
        Elsewhere: it has no counterpart here.
        TypeError, ValueError: a field is wrong; the message names it.
    """
    config = kwargs["cache_config"]
    if config.cache_type.name != "DBCache":
        raise Elsewhere(f"cache_type {config.cache_type.name}")
    if not config.cfg_diff_compute_separate and config.enable_separate_cfg:
        raise Elsewhere("cfg_diff_compute_separate=False")
    given = {name: getattr(config, name) for name in FIELDS} | {"cfg_diff_compute_separate": True}
    return DBCacheConfig(**given).recipe(forecast_of(kwargs.get("calibrator_config")))


def forecast_of(calibrator: Any) -> Predictor | None:
    """The predictor that a calibrator stands for; None for plain reuse."""
    if calibrator is None or not calibrator.enable_calibrator:
        return None
    kind = calibrator.calibrator_type
    if calibrator.calibrator_cache_type != "residual":
        raise Elsewhere(f"calibrator_cache_type {calibrator.calibrator_cache_type!r}")
    if kind == "taylorseer":
        return LateTaylor(order=calibrator.taylorseer_order)
    if kind == "dmd":
        return DMD(keep=calibrator.dmd_history, ridge=calibrator.dmd_ridge)
    raise Elsewhere(f"calibrator {kind!r}")


def adapter_of(
    transformer: Any, names: Sequence[str], blocks: Sequence[Any], patterns: Sequence[Any]
) -> BlockAdapter:
    """How the block lists of a transformer are found and driven: as cache-dit has it, the rest as its class is known.

    Args:
        transformer: the module.
        names: of the lists, in the order in which they run, the ones that cache-dit joins included.
        blocks: those lists.
        patterns: cache-dit's, of each.
    Returns:
        A BlockAdapter.
    """
    known = replace(adapter_for(transformer), blocks=tuple(names))
    kinds = {kind.__name__ for found in blocks for block in found for kind in type(block).__mro__}
    if kinds & BLOCKS.keys() or len({pattern.Out for pattern in patterns}) > 1:
        return known  # by class, or as a first call shows
    streams = {"hidden_states": HIDDEN, "encoder_hidden_states": ENCODER}
    returns: Any = tuple(streams[name] for name in patterns[0].Out)
    return replace(known, block=Block(returns=returns if len(returns) > 1 else None))
