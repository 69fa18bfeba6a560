# SPDX-License-Identifier: Apache-2.0
"""Pyramid Attention Broadcast's documented config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..policies import TimestepRange
from ..predictors import Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Kind, Modules
from .base import BARE, Config
from .patterns import CROSS, SPATIAL, TEMPORAL


@dataclass
class PyramidAttentionBroadcastConfig(Config):
    """Reuse attention outputs for n - 1 of n steps inside a timestep range, n by kind of attention.

    With all three skip ranges None, spatial attention takes 2, with a warning. Ranges (lo, hi) are of
    timesteps in the model's scale; both ends lie outside.

    Args:
        spatial_attention_block_skip_range: n of spatial attention, a count >= 1; None leaves it alone.
        temporal_attention_block_skip_range: n of temporal attention.
        cross_attention_block_skip_range: n of cross-attention.
        spatial_attention_timestep_skip_range: (lo, hi) in which spatial attention is skipped.
        temporal_attention_timestep_skip_range: (lo, hi) in which temporal attention is skipped.
        cross_attention_timestep_skip_range: (lo, hi) in which cross-attention is skipped.
        spatial_attention_block_identifiers: regular expressions, searched in dotted module names.
        temporal_attention_block_identifiers: the same for temporal attention.
        cross_attention_block_identifiers: the same for cross-attention.
        current_timestep_callback: () -> timestep of the running step, a number or a tensor; None asks
            a pipeline for its own.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range or no regular expression; the message names it.
    Source: Pyramid Attention Broadcast (arXiv 2408.12588), fields and defaults of diffusers 0.42.1.
    """

    spatial_attention_block_skip_range: int | None = None
    temporal_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    temporal_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    cross_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    spatial_attention_block_identifiers: tuple[str, ...] = SPATIAL
    temporal_attention_block_identifiers: tuple[str, ...] = TEMPORAL
    cross_attention_block_identifiers: tuple[str, ...] = CROSS
    current_timestep_callback: Callable[[], Any] | None = None

    wants_timestep = True
    _kinds: ClassVar[tuple[tuple[Kind, tuple[str, ...]], ...]] = (
        ("spatial", SPATIAL),  # first, as in diffusers, where names of the user's fit several kinds
        ("temporal", TEMPORAL),
        ("cross", CROSS),
    )

    @property
    def timestep_callback(self) -> Callable[[], Any] | None:
        return self.current_timestep_callback

    def validate(self) -> None:
        for kind, _ in self._kinds:
            self._whole(1, f"{kind}_attention_block_skip_range", optional=True)
            self._ranges(f"{kind}_attention_timestep_skip_range")
            self._identifiers(f"{kind}_attention_block_identifiers")
        self._callables("current_timestep_callback")

    def recipe(self) -> Recipe:
        self.validate()
        rules = []
        chosen = self._skip_ranges()
        if all(n is None for n in chosen.values()):
            chosen["spatial"] = 2
        for kind, usual in self._kinds:
            if (n := chosen[kind]) is None:
                continue
            when = TimestepRange(n, getattr(self, f"{kind}_attention_timestep_skip_range"), **BARE)
            names = tuple(getattr(self, f"{kind}_attention_block_identifiers"))
            label = f"{kind}_attention_block_identifiers"
            where = Modules(
                names, "search", kind, fallback="attention" if names == usual else None, label=label
            )
            rules.append(Rule(when, Reuse(), where))
        return Recipe.of(rules, self._name())

    def _skip_ranges(self) -> dict[str, int | None]:
        return {
            kind: getattr(self, f"{kind}_attention_block_skip_range") for kind, _ in self._kinds
        }

    @property
    def warning(self) -> str | None:
        """That no skip range was given, so that spatial attention takes 2."""
        if any(n is not None for n in self._skip_ranges().values()):
            return None
        return (
            "PyramidAttentionBroadcastConfig: spatial_, temporal_ and cross_attention_block_skip_range are all "
            "None; using spatial_attention_block_skip_range=2"
        )
