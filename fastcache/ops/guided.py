# SPDX-License-Identifier: Apache-2.0
"""Weights of a guided prediction, found on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .checks import check, check_samples
from .registry import define, same_shapes


def _guided_weights(
    guide: Tensor,
    guides: Sequence[Tensor],
    prior: Tensor,
    ridge: float,
    per_sample: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    run, (guide, *held) = dispatch.resolve("guided_sums", [guide, *guides], 0, per_sample)
    solve = dispatch.function(dispatch.active(guide.device.type), "guided_solve")
    return solve(run(guide, held, per_sample), prior.contiguous(), ridge, True, out)


def _fake_guided_weights(
    guide: Tensor, guides: Sequence[Tensor], prior: Tensor, ridge: float, per_sample: bool = False
) -> tuple[Tensor, Tensor]:
    same_shapes("guided_weights", guide, *guides)
    samples = guide.shape[0] if per_sample else 1
    weights = guide.new_empty((samples, prior.numel() + 2), dtype=torch.float32)
    return weights, guide.new_empty((samples,), dtype=torch.float32)


define(
    "guided_weights(Tensor guide, Tensor[] guides, Tensor prior, float ridge, bool per_sample=False) "
    "-> (Tensor, Tensor)",
    _guided_weights,
    _fake_guided_weights,
)


def _guide_into_(
    weights: Tensor,
    misfit: Tensor,
    guide: Tensor,
    guides: Sequence[Tensor],
    prior: Tensor,
    ridge: float,
) -> None:
    _guided_weights(guide, guides, prior, ridge, out=(weights[None], misfit))


def _fake_guide_into_(
    weights: Tensor,
    misfit: Tensor,
    guide: Tensor,
    guides: Sequence[Tensor],
    prior: Tensor,
    ridge: float,
) -> None:
    same_shapes("_guide_into_", guide, *guides)


# weights: float32 [K + 2]; misfit: float32 [1].
define(
    "_guide_into_(Tensor(a!) weights, Tensor(b!) misfit, Tensor guide, Tensor[] guides, Tensor prior, float ridge) "
    "-> ()",
    _guide_into_,
    _fake_guide_into_,
)


def _check_into_(
    weights: Tensor,
    misfit: Tensor,
    guide: Tensor,
    guides: Sequence[Tensor],
    values: Sequence[Tensor],
    prior: Tensor,
    before: Tensor,
    ridge: float,
) -> None:
    count = len(guides)
    streams = [[guide, *guides], *(values[i : i + count] for i in range(0, len(values), count))]
    sums = []
    for stream in streams:
        run, (newest, *older) = dispatch.resolve("guided_sums", list(stream), 0, False)
        sums.append(run(newest, older, False))
    solve = dispatch.function(dispatch.active(guide.device.type), "guided_check")
    solve(sums[0], sums[1:], prior, before, ridge, (weights[None], misfit))


def _fake_check_into_(
    weights: Tensor,
    misfit: Tensor,
    guide: Tensor,
    guides: Sequence[Tensor],
    values: Sequence[Tensor],
    prior: Tensor,
    before: Tensor,
    ridge: float,
) -> None:
    same_shapes("_check_into_", guide, *guides)


# values: of each stream as many rows as there are guides, newest first; before: float32 [K - 1], the prior of the
# newest value from the older ones.
define(
    "_check_into_(Tensor(a!) weights, Tensor(b!) misfit, Tensor guide, Tensor[] guides, Tensor[] values, Tensor prior, "
    "Tensor before, float ridge) -> ()",
    _check_into_,
    _fake_check_into_,
)


def guided_weights(
    guide: Tensor,
    guides: Sequence[Tensor],
    prior: Tensor,
    ridge: float = 0.003,
    *,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights of cached values, read off the guide of the current step; nothing goes to the host.

    Args:
        guide: of this step, [B, tokens, width].
        guides: of the last K + 1 computed steps, newest first, K = 1 to 3, of the same shape, dtype and device, any
            strides.
        prior: float32 [K], what the ridge pulls the weights of the differences toward.
        ridge: how strongly, unitless.
        per_sample: whether each sample has weights of its own.
    Returns:
        float32 (weights [S, K + 2], misfit [S]): a leading 1 for the base, then one weight per cached value; misfit is
        the relative norm of what the guides could not explain. S is B where `per_sample`, else 1.
    Raises:
        TypeError, ValueError: that names the argument.
    Source: ours.
    """
    if isinstance(guides, Tensor) or not isinstance(guides, Sequence):
        raise TypeError(
            f"guided_weights: guides is {type(guides).__name__}, must be a list of tensors"
        )
    if len(guides) not in (2, 3, 4):
        raise ValueError(f"guided_weights: guides has {len(guides)} entries, must have 2 to 4")
    check("guided_weights", guide=guide, **{f"guides[{i}]": t for i, t in enumerate(guides)})
    check_samples("guided_weights", guide, per_sample)
    check("guided_weights", prior=prior)
    if prior.dtype != torch.float32:
        raise TypeError(f"guided_weights: prior is {prior.dtype}, must be float32")
    if prior.shape != (len(guides) - 1,) or prior.device != guide.device:
        raise ValueError(
            f"guided_weights: prior must be [{len(guides) - 1}] on {guide.device}, got {tuple(prior.shape)}"
        )
    if (
        isinstance(ridge, bool)
        or not isinstance(ridge, int | float)
        or not 0 <= ridge < float("inf")
    ):
        raise ValueError(f"guided_weights: ridge is {ridge!r}, must be a finite number >= 0")
    return torch.ops.fastcache.guided_weights.default(
        guide, list(guides), prior, float(ridge), per_sample
    )
