"""Pyramid Attention Broadcast's documented config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..policies import TimestepRange
from ..predictors import Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Modules
from .base import BARE, Config
from .patterns import CROSS, SPATIAL, TEMPORAL


@dataclass
class PyramidAttentionBroadcastConfig(Config):
    """Reuse attention outputs for n - 1 of n steps inside a timestep range, n by kind of attention.

    current_timestep_callback: returns the timestep of the running step (a number or a tensor).
    Source: Pyramid Attention Broadcast (arXiv 2408.12588), diffusers 0.42.1.
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

    _kinds = (("temporal", TEMPORAL), ("cross", CROSS), ("spatial", SPATIAL))

    def validate(self) -> None:
        for kind, _ in self._kinds:
            self._whole(1, f"{kind}_attention_block_skip_range", optional=True)
            self._ranges(f"{kind}_attention_timestep_skip_range")
            self._identifiers(f"{kind}_attention_block_identifiers")
        self._callables("current_timestep_callback")

    def recipe(self) -> Recipe:
        self.validate()
        rules = []
        chosen = {
            kind: getattr(self, f"{kind}_attention_block_skip_range") for kind, _ in self._kinds
        }
        if all(n is None for n in chosen.values()):
            chosen["spatial"] = 2  # documented: with no range given, spatial attention takes 2
        for kind, usual in self._kinds:
            if chosen[kind] is None:
                continue
            when = TimestepRange(
                chosen[kind], getattr(self, f"{kind}_attention_timestep_skip_range"), **BARE
            )
            names = tuple(getattr(self, f"{kind}_attention_block_identifiers"))
            label = f"{kind}_attention_block_identifiers"
            where = Modules(
                names, "search", kind, fallback="attention" if names == usual else None, label=label
            )
            rules.append(Rule(when, Reuse(), where))
        return Recipe.of(rules, self._name())

    @property
    def warning(self) -> str | None:
        """What the user should know about the defaults taken."""
        if any(
            getattr(self, f"{kind}_attention_block_skip_range") is not None
            for kind, _ in self._kinds
        ):
            return None
        return (
            "PyramidAttentionBroadcastConfig: spatial_, temporal_ and cross_attention_block_skip_range are all "
            "None; using spatial_attention_block_skip_range=2"
        )
