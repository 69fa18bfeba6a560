# SPDX-License-Identifier: Apache-2.0
"""FasterCache's documented config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from ..checks import flag, real
from ..policies import TimestepRange
from ..predictors import Extrapolate, Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Guidance, Modules, TimestepWeight
from .base import BARE, Config
from .patterns import SPATIAL_ATTENTION, TEMPORAL_ATTENTION

TensorFormat = Literal["BCFHW", "BFCHW", "BCHW"]
TENSOR_FORMATS = get_args(TensorFormat)

_GUIDANCE_INPUTS = (
    "hidden_states",
    "encoder_hidden_states",
    "timestep",
    "attention_mask",
    "encoder_attention_mask",
)


@dataclass
class FasterCacheConfig(Config):
    """Extrapolate attention outputs, and predict the unconditional half of a batched guidance call.

    The unconditional half is rebuilt from the conditional output and the low and high frequencies of
    the last full difference between the halves. Ranges (lo, hi) are of timesteps in the model's scale;
    both ends lie outside.

    Args:
        spatial_attention_block_skip_range: inside its timestep range every how many-th call of
            spatial attention is computed, a count >= 1.
        temporal_attention_block_skip_range: the same of temporal attention; None leaves it alone.
        spatial_attention_timestep_skip_range: (lo, hi) in which spatial attention is skipped.
        temporal_attention_timestep_skip_range: (lo, hi) in which temporal attention is skipped.
        low_frequency_weight_update_timestep_range: (lo, hi) in which the low band is weighted by its
            alpha; outside by 1.
        high_frequency_weight_update_timestep_range: the same of the high band.
        alpha_low_frequency, alpha_high_frequency: weights of the bands, unitless.
        unconditional_batch_skip_range: every how many-th step computes both halves, a count >= 1.
        unconditional_batch_timestep_skip_range: (lo, hi) in which the unconditional half is skipped.
        spatial_attention_block_identifiers: regular expressions, searched in dotted module names.
        temporal_attention_block_identifiers: the same for temporal attention.
        attention_weight_callback: (module) -> weight of the extrapolation, unitless; None: 0.5.
        low_frequency_weight_callback: (module) -> weight of the low band, in place of alpha and range.
        high_frequency_weight_callback: the same of the high band.
        tensor_format: layout of the model's output: B batch, C channels, F frames, H height, W width.
        is_guidance_distilled: whether the model takes no guidance batch, so that only attention is
            skipped.
        current_timestep_callback: () -> timestep of the running step, a number or a tensor; None asks
            a pipeline for its own.
        _unconditional_conditional_input_kwargs_identifiers: names of the inputs that hold both halves
            along dimension 0, the unconditional one first.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range or no regular expression; the message names it.
    Source: FasterCache (arXiv 2410.19355), fields and defaults of diffusers 0.42.1.
    """

    spatial_attention_block_skip_range: int = 2
    temporal_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[int, int] = (-1, 681)
    temporal_attention_timestep_skip_range: tuple[int, int] = (-1, 681)
    low_frequency_weight_update_timestep_range: tuple[int, int] = (99, 901)
    high_frequency_weight_update_timestep_range: tuple[int, int] = (-1, 301)
    alpha_low_frequency: float = 1.1
    alpha_high_frequency: float = 1.1
    unconditional_batch_skip_range: int = 5
    unconditional_batch_timestep_skip_range: tuple[int, int] = (-1, 641)
    spatial_attention_block_identifiers: tuple[str, ...] = SPATIAL_ATTENTION
    temporal_attention_block_identifiers: tuple[str, ...] = TEMPORAL_ATTENTION
    attention_weight_callback: Callable[[torch.nn.Module], float] | None = None
    low_frequency_weight_callback: Callable[[torch.nn.Module], float] | None = None
    high_frequency_weight_callback: Callable[[torch.nn.Module], float] | None = None
    tensor_format: TensorFormat = "BCFHW"
    is_guidance_distilled: bool = False
    current_timestep_callback: Callable[[], Any] | None = None
    # diffusers annotates a list and defaults to a tuple
    _unconditional_conditional_input_kwargs_identifiers: Sequence[str] = _GUIDANCE_INPUTS
    wants_timestep = True

    @property
    def timestep_callback(self) -> Callable[[], Any] | None:
        return self.current_timestep_callback

    def validate(self) -> None:
        name = self._name()
        self._whole(1, "spatial_attention_block_skip_range", "unconditional_batch_skip_range")
        self._whole(1, "temporal_attention_block_skip_range", optional=True)
        self._ranges(*(f.name for f in fields(self) if f.name.endswith("timestep_skip_range")))
        self._ranges(*(f.name for f in fields(self) if f.name.endswith("update_timestep_range")))
        for key in ("alpha_low_frequency", "alpha_high_frequency"):
            real(name, key, getattr(self, key))
        self._identifiers(
            "spatial_attention_block_identifiers",
            "temporal_attention_block_identifiers",
            "_unconditional_conditional_input_kwargs_identifiers",
        )
        self._callables(*(f.name for f in fields(self) if f.name.endswith("callback")))
        if self.tensor_format not in TENSOR_FORMATS:
            raise ValueError(
                f"{name}: tensor_format is {self.tensor_format!r}, must be one of {TENSOR_FORMATS}"
            )
        flag(name, "is_guidance_distilled", self.is_guidance_distilled)

    def recipe(self) -> Recipe:
        self.validate()
        distilled, rules = self.is_guidance_distilled, []
        if not distilled:
            when = TimestepRange(
                self.unconditional_batch_skip_range,
                self.unconditional_batch_timestep_skip_range,
                **BARE,
            )
            listed = tuple(self._unconditional_conditional_input_kwargs_identifiers)
            where = Guidance(
                label="_unconditional_conditional_input_kwargs_identifiers",
                # the default means every batched input
                inputs=None if listed == _GUIDANCE_INPUTS else listed,
                tensor_format=self.tensor_format,
                low=self._band("low"),
                high=self._band("high"),
            )
            rules.append(Rule(when, Reuse(), where))
        weight = (
            self.attention_weight_callback if self.attention_weight_callback is not None else 0.5
        )
        for kind, usual in (("spatial", SPATIAL_ATTENTION), ("temporal", TEMPORAL_ATTENTION)):
            n = getattr(self, f"{kind}_attention_block_skip_range")
            if n is None:
                continue
            names = tuple(getattr(self, f"{kind}_attention_block_identifiers"))
            when = TimestepRange(
                n,
                getattr(self, f"{kind}_attention_timestep_skip_range"),
                conditional_only=not distilled,
                **BARE,
            )
            label = f"{kind}_attention_block_identifiers"
            where_ = Modules(
                names,
                "search",
                "self",
                fallback="attention" if names == usual else None,
                label=label,
            )
            rules.append(Rule(when, Extrapolate(weight), where_))
        return Recipe.of(rules, self._name())

    def _band(self, band: str) -> Callable[[torch.nn.Module, float | None], float]:
        """(module, timestep) -> weight of one frequency band."""
        callback = getattr(self, f"{band}_frequency_weight_callback")
        if callback is not None:
            return lambda module, timestep: float(callback(module))
        return TimestepWeight(
            getattr(self, f"alpha_{band}_frequency"),
            getattr(self, f"{band}_frequency_weight_update_timestep_range"),
        )
