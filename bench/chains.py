# SPDX-License-Identifier: Apache-2.0
"""The cache ops as `bench/ops.py` compares them: ours, and the eager expressions they replace.

A buffer set is a dict of tensors. y: output of a block, x: its input, r and prev: residuals, out: a
destination of our own, f0..f2: Taylor factors or guides, newest first. The eager chains are those of
diffusers 0.42.1 (`hooks/first_block_cache.py`, `mag_cache.py`, `taylorseer_cache.py`, `faster_cache.py`)
and cache-dit 1.5.3 (`cache_manager.py`, `calibrators/taylorseer.py`) on one tensor, without the read
of the decision, which is counted separately; TeaCache's is that of its own code (TeaCache4FLUX) with the norm
of diffusers' block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcache import ops
from fastcache.ops import reference

Buffers = dict[str, Tensor]
OFFSET = 2  # steps since the last refresh, in the Taylor chains


@dataclass(frozen=True)
class Op:
    """One operation. passes: tensors read and written at least; reads: values the host reads back."""

    name: str
    what: str
    passes: int
    tensors: str  # names of the buffers
    ours: Callable[[Buffers], Any]
    eager: dict[str, Callable[[Buffers], Any]]
    compiled: dict[str, Callable[[Buffers], Any]]
    result: str = "out"  # the buffer that ours writes, compared with the reference
    reads: int = 0
    finish: int = 0  # launches of ours after those that read the buffers


# --- first-block decision --------------------------------------------------------------------------------


def decision(b: Buffers) -> tuple[Tensor, Tensor]:
    residual = b["y"] - b["x"]
    change = (residual - b["prev"]).abs().mean()
    return residual, change / b["prev"].abs().mean()


def decision_cache_dit(b: Buffers) -> tuple[Tensor, Tensor]:
    residual = b["y"] - b["x"]
    mean_diff = (b["prev"] - residual).abs().mean()
    mean_t1 = b["prev"].abs().mean()
    return residual, mean_diff / mean_t1


def decision_out(b: Buffers) -> Tensor:
    residual, ratio = decision(b)
    b["out"].copy_(residual)
    return ratio


# --- TeaCache's signal ----------------------------------------------------------------------------------


def _modulation(b: Buffers) -> tuple[Tensor, Tensor]:
    """Rows [1, C] of scale and shift."""
    return b["x"][:1] * 0.1, b["x"][1:2] * 0.1


def modulated(b: Buffers) -> tuple[Tensor, Tensor]:
    scale, shift = _modulation(b)
    normed = torch.nn.functional.layer_norm(b["x"], b["x"].shape[-1:], eps=1e-6)
    m = normed * (1 + scale) + shift
    return m, (m - b["prev"]).abs().mean() / b["prev"].abs().mean()


def modulated_out(b: Buffers) -> Tensor:
    m, ratio = modulated(b)
    b["out"].copy_(m)
    return ratio


def modulated_ours(b: Buffers) -> Tensor:
    scale, shift = _modulation(b)
    out = b["out"][None] if "out" in b else None
    return ops.modulated_l1(b["x"][None], scale, shift, b["prev"][None], out)


# --- MagCache -------------------------------------------------------------------------------------------


def magnitude(b: Buffers) -> tuple[Tensor, Tensor]:
    residual = b["y"] - b["x"]
    now = torch.linalg.norm(residual.float(), dim=-1)
    before = torch.linalg.norm(b["prev"].float(), dim=-1)
    return residual, (now / (before + 1e-8)).mean()


def magnitude_out(b: Buffers) -> Tensor:
    residual, ratio = magnitude(b)
    b["out"].copy_(residual)
    return ratio


# --- weighted sums --------------------------------------------------------------------------------------


def store(b: Buffers) -> Tensor:
    return b["y"] - b["x"]


def store_out(b: Buffers) -> None:
    b["out"].copy_(b["y"] - b["x"])


def apply(b: Buffers) -> Tensor:
    return b["x"] + b["r"]


def apply_out(b: Buffers) -> None:
    b["out"].copy_(b["x"] + b["r"])


def extrapolate(b: Buffers) -> Tensor:
    return b["f0"] + (b["f0"] - b["f1"]) * 0.5


def extrapolate_out(b: Buffers) -> None:
    b["out"].copy_(extrapolate(b))


def _factors(b: Buffers) -> list[Tensor]:
    return [b[name] for name in ("f0", "f1", "f2") if name in b]


def _coefficients(count: int) -> list[float]:
    return [OFFSET**k / math.factorial(k) for k in range(count)]


def predict(b: Buffers) -> Tensor:
    factors = _factors(b)
    output = torch.zeros_like(factors[0])
    for order, factor in enumerate(factors):
        output = output + factor.to(output.dtype) * (OFFSET**order / math.factorial(order))
    return output


def predict_cache_dit(b: Buffers) -> Tensor:
    output: Any = 0
    for i, derivative in enumerate(_factors(b)):
        output += (1 / math.factorial(i)) * derivative * (OFFSET**i)
    return output


def predict_out(b: Buffers) -> None:
    b["out"].copy_(predict(b))


def update(b: Buffers) -> list[Tensor]:
    new = [b["y"]]
    for j, old in enumerate(_factors(b)[:-1]):
        new.append((new[j] - old.to(new[j].dtype)) / OFFSET)
    return [factor.to(b["f0"].dtype) for factor in new]


def update_in_place(b: Buffers) -> None:
    # older ones first: the history shift of pytorch issue 198131 is not to be seen here
    factors = _factors(b)
    new = update(b)
    for j in reversed(range(len(factors))):
        factors[j].copy_(new[j])


# --- guided prediction ----------------------------------------------------------------------------------


def guided(b: Buffers) -> Tensor:
    sums = reference.guided_sums(b["y"], _factors(b))
    prior = b["y"].new_zeros(2, dtype=torch.float32)
    return reference.guided_solve(sums, prior, ridge=0.003, base=True)[0]


def guided_ours(b: Buffers) -> Tensor:
    prior = b["y"].new_zeros(2, dtype=torch.float32)
    return ops.guided_weights(b["y"], _factors(b), prior)[0]


OPS = (
    Op(
        "residual_l1 + store",
        "first-block residual, its relative change, and the residual kept",
        4,
        "y x prev out",
        lambda b: ops.residual_l1(b["y"], b["x"], b["prev"], b["out"]),
        {"diffusers": decision, "cache-dit": decision_cache_dit},
        {"compile": decision, "compile out=": decision_out},
        reads=1,
    ),
    Op(
        "residual_l1",
        "the same without keeping the residual",
        3,
        "y x prev",
        lambda b: ops.residual_l1(b["y"], b["x"], b["prev"]),
        {"diffusers": decision, "cache-dit": decision_cache_dit},
        {"compile": lambda b: decision(b)[1]},
        result="",
        reads=1,
    ),
    Op(
        "residual_magnitude + store",
        "MagCache's calibration: mean ratio of token norms",
        4,
        "y x prev out",
        lambda b: ops.residual_magnitude(b["y"], b["x"], b["prev"], b["out"]),
        {"diffusers": magnitude},
        {"compile": magnitude, "compile out=": magnitude_out},
        reads=1,
    ),
    Op(
        "modulated_l1 + store",
        "TeaCache's signal: the first block's modulated input, its relative change, and the input kept",
        3,
        "x prev out",
        modulated_ours,
        {"TeaCache": modulated},
        {"compile": modulated, "compile out=": modulated_out},
        reads=1,
    ),
    Op(
        "residual_store",
        "y - x into a slot",
        3,
        "y x out",
        lambda b: ops.residual_store(b["y"], b["x"], b["out"]),
        {"diffusers": store},
        {"compile": store, "compile out=": store_out},
    ),
    Op(
        "residual_apply",
        "x + r",
        3,
        "x r out",
        lambda b: ops.residual_apply(b["x"], b["r"], b["out"]),
        {"diffusers": apply},
        {"compile": apply, "compile out=": apply_out},
    ),
    Op(
        "linear_combine of 2",
        "FasterCache's extrapolation of attention",
        3,
        "f0 f1 out",
        lambda b: ops.linear_combine([b["f0"], b["f1"]], [1.5, -0.5], b["out"]),
        {"diffusers": extrapolate},
        {"compile": extrapolate, "compile out=": extrapolate_out},
    ),
    Op(
        "linear_combine of 3",
        "Taylor prediction of order 2",
        4,
        "f0 f1 f2 out",
        lambda b: ops.linear_combine(_factors(b), _coefficients(3), b["out"]),
        {"diffusers": predict, "cache-dit": predict_cache_dit},
        {"compile": predict, "compile out=": predict_out},
    ),
    Op(
        "taylor_update of order 2",
        "the difference table after a computed step",
        6,
        "y f0 f1 f2",
        lambda b: ops.taylor_update_(_factors(b), b["y"], 1 / OFFSET, 3),
        {"diffusers": update, "cache-dit": update},
        {"compile": update, "compile out=": update_in_place},
        result="f2",
    ),
    Op(
        "guided_weights of order 2",
        "weights of cached values, read off the guides of all tokens",
        4,
        "y f0 f1 f2",
        guided_ours,
        {},  # nobody else has it; the reference is its eager chain
        {"compile": guided},
        result="",
        finish=1,
    ),
)
