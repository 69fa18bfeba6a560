# SPDX-License-Identifier: Apache-2.0
"""The config of cache-dit's DBCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import flag, limit, marks_of
from ..policies import DualBlock, Mask, Policy
from ..predictors import Predictor, Reuse
from ..recipe import Recipe, Rule
from ..targets.spec import Stack
from .base import BARE, Config

WORDS = {
    "steps_computation_policy": ("dynamic", "static"),
    "force_refresh_step_policy": ("once", "repeat"),
}


@dataclass
class DBCacheConfig(Config):
    """Run the first and the last blocks on every step, and skip those between while the first ones change little.

    Args:
        Fn_compute_blocks, Bn_compute_blocks: how many of the first and of the last blocks always run, counts, the
            block lists of a model being one; Fn at least 1.
        residual_diff_threshold: relative L1 change of what the first Fn blocks add, unitless; steps below it skip.
        max_accumulated_residual_diff_threshold: sum of these changes from which on all is computed; None: no limit.
        max_warmup_steps: steps computed at the start, a count.
        warmup_interval: their distance, a count >= 1.
        max_cached_steps, max_continuous_cached_steps: most skipped steps of a run, and in a row; -1: no limit.
        num_inference_steps: steps of a run, a count; only a "static" mask asks for it, to be continued to its end.
        steps_computation_mask: 1 for each step that is computed; None: no mask.
        steps_computation_policy: what becomes of the others: "dynamic" decides by the change, "static" skips all.
        force_refresh_step_hint: index of a step that begins as a run does; None: none.
        force_refresh_step_policy: "once", or "repeat" for every multiple of it.
        enable_separate_cfg, cfg_compute_first: taken and not needed, since branches are told apart by themselves.
        cfg_diff_compute_separate: True; every branch decides by a change of its own.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: cache-dit 1.5.3, fields and defaults. There, each block list of a model counts, and decides, for itself.
    """

    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    num_inference_steps: int | None = None
    steps_computation_mask: Sequence[int] | None = None
    steps_computation_policy: str = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"

    def validate(self) -> None:
        name = self._name()
        self._whole(1, "Fn_compute_blocks", "warmup_interval")
        self._whole(0, "Bn_compute_blocks", "max_warmup_steps")
        self._whole(-1, "max_cached_steps", "max_continuous_cached_steps")
        self._whole(1, "num_inference_steps", "force_refresh_step_hint", optional=True)
        limit(name, "residual_diff_threshold", self.residual_diff_threshold)
        if self.max_accumulated_residual_diff_threshold is not None:
            most = self.max_accumulated_residual_diff_threshold
            limit(name, "max_accumulated_residual_diff_threshold", most)
        if self.steps_computation_mask is not None:
            marks_of(name, "steps_computation_mask", self.steps_computation_mask)
        for field, words in WORDS.items():
            if (value := getattr(self, field)) not in words:
                raise ValueError(f"{name}: {field} is {value!r}, must be one of {words}")
        if self.enable_separate_cfg is not None:
            flag(name, "enable_separate_cfg", self.enable_separate_cfg)
        flag(name, "cfg_compute_first", self.cfg_compute_first)
        if not flag(name, "cfg_diff_compute_separate", self.cfg_diff_compute_separate):
            raise ValueError(
                f"{name}: cfg_diff_compute_separate is False, must be True: every branch decides by a change of its own"
            )
        if self._static and self.force_refresh_step_hint and self.num_inference_steps is None:
            raise ValueError(
                f"{name}: num_inference_steps is None; give it where a static mask has force_refresh_step_hint"
            )

    def recipe(self, what: Predictor | None = None) -> Recipe:
        """The rule that this config stands for.

        Args:
            what: a predictor; None: `Reuse()`.
        Returns:
            A recipe with the guards of the config alone, named after it.
        Raises:
            TypeError, ValueError: as `validate`, of a field that was assigned in between.
        """
        self.validate()
        where = Stack(self.Fn_compute_blocks, self.Bn_compute_blocks)
        return Recipe.of((Rule(self._policy(), what or Reuse(), where),), self._name())

    @property
    def _static(self) -> bool:
        masked = self.steps_computation_mask is not None
        return masked and self.steps_computation_policy == "static"

    def _policy(self) -> Policy:
        row, most = self.max_continuous_cached_steps, self.max_cached_steps
        dynamic = DualBlock(
            float(self.residual_diff_threshold),
            interval=self.warmup_interval,
            max_reused=0 if not row else None if most < 0 else most,  # no row at all
            budget=self.max_accumulated_residual_diff_threshold,
            compute=self.steps_computation_mask,
            refresh=self.force_refresh_step_hint,
            repeat=self.force_refresh_step_policy == "repeat",
            **{**BARE, "warmup": self.max_warmup_steps, "max_skips": max(row, 0)},
        )
        return Mask(dynamic.marks(self.num_inference_steps)) if self._static else dynamic
