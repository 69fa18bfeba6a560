# SPDX-License-Identifier: Apache-2.0
"""cache-dit's context manager: the first blocks' change, and the cached value applied, in one pass each."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops import direct
from .forecast import combine, fits, terms

PAIR = "fastcache_pair"  # the residual that was just taken, and what it was taken of
l1 = direct("residual_l1")
HALF, SINGLE, WORD = struct.Struct("<e"), struct.Struct("<f"), struct.Struct("<I")


def residual(theirs: Any) -> Callable[..., Any]:
    """`_get_Fn_residual` that remembers, until the decision, of which tensors it took the difference."""

    def taken(self: Any, original_hidden_states: Any, hidden_states: Any) -> Any:
        value = theirs.residual(self, original_hidden_states, hidden_states)
        if not torch.compiler.is_compiling():
            vars(self.context_manager)[PAIR] = (value, hidden_states, original_hidden_states)
        return value

    return taken


def can_cache(theirs: Any) -> Callable[..., bool]:
    """`can_cache` that asks its context for facts once, and lets go of the pair."""

    def decided(
        self: Any,
        states_tensor: Tensor,
        parallelized: bool = False,
        threshold: float | None = None,
        prefix: str = "Fn",
    ) -> bool:
        try:
            context = self.current_context
            if type(self) is not theirs.manager or context.extra_cache_config.downsample_factor > 1:
                given = (states_tensor, parallelized, threshold, prefix)
                return bool(theirs.can_cache(self, *given))
            if (fixed := settled(context)) is not None:
                return fixed
            if threshold is None or threshold <= 0.0:
                threshold = context.get_residual_diff_threshold()
                if threshold <= 0.0:
                    return False
            if "Bn" in prefix:
                before = self.get_Bn_buffer(prefix)
            else:
                suffix = "buffer_cfg" if context.is_separate_cfg_step() else "buffer"
                before = context.get_buffer(f"{prefix}_{suffix}")
            return before is not None and self.similarity(
                before,
                states_tensor,
                threshold=threshold,
                parallelized=parallelized,
                prefix=prefix,
            )
        finally:
            vars(self).pop(PAIR, None)

    return decided


def settled(context: Any) -> bool | None:
    """What warm-up, mask and limits of a context say of its step; None where the change is to be looked at."""
    config = context.cache_config
    if context.is_in_warmup():
        return False
    if config.steps_computation_mask is not None:
        if context.is_in_full_compute_steps():
            return False
        if config.steps_computation_policy == "static":
            return True
    if context.is_separate_cfg_step():
        cached, row = context.cfg_cached_steps, context.cfg_continuous_cached_steps
        total = context.cfg_accumulated_residual_diff
    else:
        cached, row = context.cached_steps, context.continuous_cached_steps
        total = context.accumulated_residual_diff
    if cached and cached[-1] == context.get_current_step():
        row -= 1
    most = config.max_accumulated_residual_diff_threshold
    if (
        0 <= config.max_cached_steps <= len(cached)
        or 0 <= config.max_continuous_cached_steps <= row
        or (most is not None and 0.0 < most <= total)
    ):
        return False
    return None


def similarity(theirs: Any) -> Callable[..., bool]:
    """`similarity` whose two sums come of one pass over the hidden states."""

    def compared(
        self: Any,
        t1: Tensor,
        t2: Tensor,
        *,
        threshold: float,
        parallelized: bool = False,
        prefix: str = "Fn",
    ) -> bool:
        value, after, before = vars(self).get(PAIR, (None, None, None))
        context = self.current_context
        measured = (
            value is t2
            and 0.0 < threshold < 1.0
            and fits(value, t1, after, before)
            and context.extra_cache_config.important_condition_threshold <= 0.0
        )
        if not measured:
            return bool(
                theirs.similarity(
                    self, t1, t2, threshold=threshold, parallelized=parallelized, prefix=prefix
                )
            )
        diff = None
        config = context.cache_config
        if (
            config.enable_separate_cfg
            and not config.cfg_diff_compute_separate
            and context.is_separate_cfg_step()
        ):
            diff = self.get_current_step_residual_diff()
        if diff is None:
            diff = change(l1(after, before, t1), t1, parallelized)
        context.add_residual_diff(diff)
        return bool(diff < threshold)

    return compared


def change(sums: Tensor, like: Tensor, parallelized: bool) -> float:
    """Mean |now - before| over mean |before|, each rounded to the dtype as cache-dit's are; one read of the device."""
    count, dtype = like.numel(), like.dtype
    if parallelized:
        means = (sums / count).to(dtype)
        torch.distributed.all_reduce(means, op=torch.distributed.ReduceOp.AVG)
        moved, size = means.tolist()
    else:
        moved, size = (rounded(total / count, dtype) for total in sums.tolist())
    return (
        rounded(moved / size, dtype) if size else math.nan if moved in (0, math.nan) else math.inf
    )


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as a dtype holds it, to the nearest, ties to even."""
    if dtype is torch.float16:
        try:
            (half,) = HALF.unpack(HALF.pack(value))
        except OverflowError:
            half = math.copysign(math.inf, value)
        return float(half)
    if dtype is torch.float32:
        (single,) = SINGLE.unpack(SINGLE.pack(value))
        return float(single)
    (bits,) = WORD.unpack(SINGLE.pack(value))
    if math.isfinite(value):
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    (number,) = SINGLE.unpack(WORD.pack(bits))
    return float(number)


def apply_cache(theirs: Any) -> Callable[..., Any]:
    """`apply_cache` as one weighted sum per stream, the forecast included."""

    def applied(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        prefix: str = "Bn",
        encoder_prefix: str = "Bn_encoder",
    ) -> Any:
        if "Bn" not in prefix or "Bn" not in encoder_prefix:
            return theirs.apply_cache(
                self, hidden_states, encoder_hidden_states, prefix, encoder_prefix
            )
        context = self.current_context
        second = context.is_separate_cfg_step()
        main, side = context.get_cfg_calibrators() if second else context.get_calibrators()
        suffix = "buffer_cfg" if second else "buffer"
        residual = context.calibrator_cache_type() == "residual"
        enabled = context.enable_calibrator()
        cached = (
            of_calibrator(main, prefix, theirs.taylor)
            if enabled and main is not None
            else of_buffer(context.get_buffer(f"{prefix}_{suffix}"))
        )
        assert cached is not None, f"{prefix}_buffer must be set before"
        hidden_states = joined(hidden_states, *cached, residual or not enabled)
        if encoder_hidden_states is not None:
            enabled = context.enable_encoder_calibrator()
            cached = (
                of_calibrator(side, encoder_prefix, theirs.taylor)
                if enabled and side is not None
                else of_buffer(context.get_buffer(f"{encoder_prefix}_encoder_{suffix}"))
            )
            if cached is not None:
                add = residual or not enabled
                encoder_hidden_states = joined(encoder_hidden_states, *cached, add)
            encoder_hidden_states = encoder_hidden_states.contiguous()
        return hidden_states, encoder_hidden_states

    return applied


Cached = tuple[list[Tensor], list[float]]


def of_buffer(value: Tensor | None) -> Cached | None:
    return None if value is None else ([value], [1.0])


def of_calibrator(calibrator: Any, name: str, taylor: Any) -> Cached:
    """The terms of a Taylor calibrator's forecast; what another one returns."""
    if isinstance(calibrator, taylor) and name in calibrator.states:
        factors, weights = terms(calibrator.states[name])
        if factors:
            return factors, weights
    return [calibrator.approximate(name=name)], [1.0]


def joined(hidden: Tensor, tensors: list[Tensor], weights: list[float], add: bool) -> Tensor:
    """The weighted sum of what is cached, with the hidden states added where that is a residual."""
    if len(tensors) == 1:  # of weight 1: torch's own addition is one pass too
        return (tensors[0] + hidden if add else tensors[0]).contiguous()
    if not fits(hidden, *tensors):
        total = hidden if add else torch.zeros_like(hidden)
        for tensor, weight in zip(tensors, weights, strict=True):
            total = total + weight * tensor
        return total.contiguous()
    # no memory format is asked for where that is what comes
    out = (
        torch.empty_like(hidden)
        if hidden.is_contiguous()
        else torch.empty_like(hidden, memory_format=torch.contiguous_format)
    )
    if add:
        combine(out, [*tensors, hidden], [*weights, 1.0])
    else:
        combine(out, tensors, weights)
    return out
