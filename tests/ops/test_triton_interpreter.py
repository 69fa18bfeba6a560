# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel in Triton's interpreter against the reference.

Triton decides when it is imported whether it interprets, so the cases run in a child process:
started as a script, this file reads names of cases from stdin and answers with one JSON line each.
`test_triton_gpu.py` runs the same cases compiled.

Inputs lie between NaN, so an unmasked read spoils a sum. Outputs are NaN between sevens, so an
element that is not written shows, and so does one too many.
The interpreter truncates float32 to bfloat16 where hardware rounds, so bfloat16 outputs may be one
unit in the last place off there, and reductions get bfloat16 values whose difference is exact.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastcache
import fastcache.ops
from fastcache.ops import reference

FP32, FP16, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
DTYPES = {"fp32": FP32, "fp16": FP16, "bf16": BF16}
LAYOUTS = ("dense", "odd", "range")
NAN = float("nan")
# Longer than a block: a whole block may be read or written past the end without a crash.
MARGIN = 64 + 4096 + 64
# 4096 elements are one block: below, just below, and several programs with a tail
SHAPES = ((1, 1), (2, 380), (1, 4095), (3, 41, 100), (2, 64, 96))


# --- references of the ops that fastcache.reference does not define ------------------------------


def quantize_store(y: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """(q, scale): r = y - x (or y) as e4m3, scale = max |r| / 448 per row, 1 below 2**-117."""
    r = y.float() if x is None else y.float() - x.float()
    largest = r.abs().amax(-1)
    tiny = largest < 2.0**-117
    scale = torch.where(tiny, 1.0, largest / 448)
    return (r * (1 / scale)[..., None]).to(E4M3), scale


def quantized_combine(
    base: Tensor | None, qs: Sequence[Tensor], scales: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """float32: base + sum_i (weights[i] * scales[i]) * qs[i], added in order."""
    total = torch.zeros(qs[0].shape) if base is None else base.float()
    for q, scale, weight in zip(qs, scales, weights, strict=True):
        total = total + q.float() * (scale * weight)[..., None]
    return total


def guided_sums(guide: Tensor, guides: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    """float64 [S, M]: upper triangle of D D^T, D q, q.q."""
    groups = guide.shape[0] if per_sample else 1
    g = [t.double().reshape(groups, -1) for t in (guide, *guides)]
    q, d = g[0] - g[1], [a - b for a, b in pairwise(g[1:])]
    pairs = [(a, b) for i, a in enumerate(d) for b in d[i:]] + [(a, q) for a in d] + [(q, q)]
    return torch.stack([(a * b).sum(1) for a, b in pairs], dim=1)


def guided_solve(sums: Tensor, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """float64 (w [S, K], misfit [S]) for sums that are well conditioned."""
    k = prior.numel()
    gram = sums.new_zeros(sums.shape[0], k, k)
    upper = torch.triu_indices(k, k)
    gram[:, upper[0], upper[1]] = gram[:, upper[1], upper[0]] = sums[:, : k * (k + 1) // 2]
    dq, qq = sums[:, -k - 1 : -1], sums[:, -1]
    pull = ridge * gram.diagonal(dim1=1, dim2=2).mean(1)
    system = gram + pull[:, None, None] * torch.eye(k, dtype=sums.dtype)
    w = torch.linalg.solve(system, dq + pull[:, None] * prior.double())
    square = qq - 2 * (w * dq).sum(1) + (w[:, None, :] @ gram @ w[:, :, None])[:, 0, 0]
    return w, (square.clamp_min(0) / qq).sqrt()


# --- the bench a case works on -------------------------------------------------------------------


@dataclass
class Lab:
    """The kernels, the device they run on, and every tensor that a case placed there."""

    kernels: ModuleType
    device: str
    placed: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    seed: int = 0

    @property
    def truncates(self) -> bool:
        return self.device == "cpu"

    def draw(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        """Normal values on the host; multiples of 1/8 where differences must be exact."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        t = torch.randn(shape, generator=generator)
        if dtype == BF16 and self.truncates:
            t = (t * 8).round().clamp(-32, 32) / 8
        return t.to(dtype)

    def place(self, t: Tensor, layout: str = "dense", around: float = NAN) -> Tensor:
        """A copy of `t` on the device inside a larger buffer."""
        if layout == "range" and t.dim() == 3:
            batch, tokens, width = t.shape
            buffer = self._full((batch, tokens + 7, width), t.dtype, around)
            view = buffer[:, 3 : 3 + tokens]
        else:
            start = 65 if layout == "odd" else 64
            buffer = self._full((t.numel() + MARGIN,), t.dtype, around)
            view = buffer[start : start + t.numel()].view(t.shape)
        view.copy_(t)
        self.placed.append((view, buffer, around))
        return view

    def blank(self, *shape: int, dtype: torch.dtype = FP32, layout: str = "dense") -> Tensor:
        return self.place(self._full(shape, dtype, NAN), layout, around=7.0)

    def _full(self, shape: Sequence[int], dtype: torch.dtype, value: float) -> Tensor:
        return torch.full(shape, value, device=self.device).to(dtype)

    def check_surroundings(self) -> None:
        for view, buffer, around in self.placed:
            view.copy_(self._full(view.shape, view.dtype, around))
            same = buffer.float().isnan() if math.isnan(around) else buffer.float() == around
            assert same.all(), f"a write outside a view of {tuple(view.shape)}"

    def same(self, got: Tensor, want: Tensor) -> None:
        """Equal bits; one unit in the last place for bfloat16 in the interpreter."""
        assert got.dtype == want.dtype
        ulp = 2.0**-7 if want.dtype == BF16 and self.truncates else 0.0
        torch.testing.assert_close(got.cpu(), want, rtol=ulp, atol=0, equal_nan=True)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative to float64; NaN and infinities agree."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    torch.testing.assert_close(
        got.cpu().double(), want.double(), rtol=tolerance, atol=0, equal_nan=True
    )


CASES: dict[str, Callable[[Lab], None]] = {}


def case(**grid: Sequence[object]) -> Callable:
    """Register a function of (lab, **parameters) once per combination of parameters."""

    def combinations(names: list[str], chosen: dict[str, object]) -> Iterator[dict[str, object]]:
        if not names:
            yield chosen
            return
        for value in grid[names[0]]:
            yield from combinations(names[1:], chosen | {names[0]: value})

    def register(function: Callable) -> Callable:
        for chosen in combinations(list(grid), {}):
            label = "-".join(
                "x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in chosen.values()
            )
            CASES[f"{function.__name__} {label}".strip()] = lambda lab, c=chosen: function(lab, **c)
        return function

    return register


# --- elementwise ---------------------------------------------------------------------------------


@case(dtype=DTYPES, layout=LAYOUTS, shape=SHAPES)
def store_and_apply(lab: Lab, dtype: str, layout: str, shape: tuple[int, ...]) -> None:
    y, x = (lab.draw(*shape, dtype=DTYPES[dtype]) for _ in range(2))
    want, got = torch.empty_like(y), lab.blank(*shape, dtype=DTYPES[dtype], layout=layout)
    at_y, at_x = lab.place(y, layout), lab.place(x, layout)
    reference.residual_store(want, y, x)
    lab.kernels.residual_store(got, at_y, at_x)
    lab.same(got, want)
    reference.residual_apply(want, x, y)
    lab.kernels.residual_apply(at_x, at_x, at_y)
    lab.same(at_x, want)


@case(dtype=DTYPES, terms=(1, 2, 3, 5, 8), on_device=(False, True), layout=LAYOUTS)
def combine(lab: Lab, dtype: str, terms: int, on_device: bool, layout: str) -> None:
    tensors = [lab.draw(2, 47, 100, dtype=DTYPES[dtype]) for _ in range(terms)]
    weights = [(-1) ** i * (0.3 + i) for i in range(terms)]
    want = torch.empty_like(tensors[0])
    reference.linear_combine(want, tensors, weights)
    placed = [lab.place(t, layout) for t in tensors]
    got = lab.blank(*want.shape, dtype=want.dtype, layout=layout)
    given = torch.tensor(weights, device=lab.device) if on_device else weights
    lab.kernels.linear_combine(got, placed, given)
    lab.same(got, want)
    lab.kernels.linear_combine(placed[-1], placed, given)
    lab.same(placed[-1], want)


@case(dtype=DTYPES, terms=(1, 3, 8), shape=((1, 300), (3, 47, 100)), layout=LAYOUTS)
def combine_each_sample(
    lab: Lab, dtype: str, terms: int, shape: tuple[int, ...], layout: str
) -> None:
    tensors = [lab.draw(*shape, dtype=DTYPES[dtype]) for _ in range(terms)]
    weights = torch.tensor(
        [[(-1) ** i * (0.3 + i + b) for i in range(terms)] for b in range(shape[0])]
    )
    want = torch.empty_like(tensors[0])
    reference.combine_samples(want, tensors, weights)
    placed = [lab.place(t, layout) for t in tensors]
    got = lab.blank(*want.shape, dtype=want.dtype, layout=layout)
    lab.kernels.combine_samples(got, placed, weights.to(lab.device))
    lab.same(got, want)
    lab.kernels.combine_samples(placed[-1], placed, weights.to(lab.device))
    lab.same(placed[-1], want)


@case()
def combine_mixed_dtypes(lab: Lab) -> None:
    tensors = [lab.draw(3, 700, dtype=dtype) for dtype in (BF16, FP32, FP16)]
    want = torch.empty(3, 700, dtype=FP16)
    reference.linear_combine(want, tensors, [1, -2, 3])
    got = lab.blank(3, 700, dtype=FP16)
    lab.kernels.linear_combine(got, [lab.place(t) for t in tensors], [1, -2, 3])
    lab.same(got, want)


@case()
def special_values_pass_through(lab: Lab) -> None:
    special = torch.tensor([NAN, math.inf, -math.inf, 0.0, -0.0, 65504.0, 1e-30, 1e38])
    y, x = special.repeat(8), special.repeat_interleave(8)
    for dtype in (FP32, FP16):
        want, got = torch.empty(64, dtype=dtype), lab.blank(64, dtype=dtype)
        a, b = y.to(dtype), x.to(dtype)
        reference.linear_combine(want, [a, b], [2.0, -0.5])
        lab.kernels.linear_combine(got, [lab.place(a), lab.place(b)], [2.0, -0.5])
        lab.same(got, want)
        close(
            lab.kernels.residual_l1(lab.place(a), lab.place(b), lab.place(b)),
            reference.residual_l1(a, b, b),
            0,
        )
        close(
            lab.kernels.residual_l1(*(lab.place(t[:, None]) for t in (a, b, b)), per_sample=True),
            reference.residual_l1(a[:, None], b[:, None], b[:, None], per_sample=True),
            2e-6,
        )


@case(dtype=DTYPES, shape=((1, 5, 33), (2, 3, 4, 30)))
def guidance(lab: Lab, dtype: str, shape: tuple[int, ...]) -> None:
    cond, low, high = lab.draw(*shape, dtype=DTYPES[dtype]), lab.draw(*shape), lab.draw(*shape)
    want = torch.empty((2 * shape[0], *shape[1:]), dtype=cond.dtype)
    reference.guidance_combine(want, cond, low, high, 1.1, 0.7)
    got = lab.blank(*want.shape, dtype=cond.dtype)
    lab.kernels.guidance_combine(got, lab.place(cond), lab.place(low), lab.place(high), 1.1, 0.7)
    lab.same(got, want)


@case(dtype=DTYPES, order=(0, 1, 2, 4), layout=LAYOUTS)
def taylor(lab: Lab, dtype: str, order: int, layout: str) -> None:
    y = lab.draw(3, 47, 30, dtype=DTYPES[dtype])
    for valid in range(order + 2):
        factors = [lab.draw(3, 47, 30, dtype=DTYPES[dtype]) for _ in range(order + 1)]
        placed = [lab.place(t, layout) for t in factors]
        for inv_delta in (1.0, 1 / 3):
            reference.taylor_update(factors, y, inv_delta, valid)
            lab.kernels.taylor_update(placed, lab.place(y, layout), inv_delta, valid)
            if not lab.truncates or dtype != "bf16":
                for got, want in zip(placed, factors, strict=True):
                    lab.same(got, want)
            factors = [t.cpu().clone() for t in placed]


@case()
def taylor_with_stored_bf16_and_no_gap(lab: Lab) -> None:
    y, old = lab.draw(2, 300), lab.draw(2, 300, dtype=BF16)
    factors, placed = [old.clone(), old.clone()], [lab.place(old), lab.place(old)]
    reference.taylor_update(factors, y, 0.0, 1)
    lab.kernels.taylor_update(placed, lab.place(y), 0.0, 1)
    for got, want in zip(placed, factors, strict=True):
        lab.same(got, want)


# The argument that takes the result of a reduction.
RESULT = {"residual_l1": "sums", "residual_magnitude": "mean"}

# --- reductions ----------------------------------------------------------------------------------


@case(dtype=DTYPES, layout=LAYOUTS, shape=SHAPES, per_sample=(False, True))
def l1(lab: Lab, dtype: str, layout: str, shape: tuple[int, ...], per_sample: bool) -> None:
    y, x, prev = (lab.draw(*shape, dtype=DTYPES[dtype]) for _ in range(3))
    want_out, out = torch.empty_like(y), lab.blank(*shape, dtype=y.dtype, layout=layout)
    want = reference.residual_l1(y, x, prev, want_out, per_sample)
    placed = [lab.place(t, layout) for t in (y, x, prev)]
    got = lab.kernels.residual_l1(*placed, out, per_sample)
    close(got, want, 2e-6)
    torch.testing.assert_close(out.cpu(), want_out, rtol=0, atol=0)
    again = lab.kernels.residual_l1(*placed, per_sample=per_sample)
    assert torch.equal(got, again), "storing the residual, or a second run, changes the sums"


@case(dtype=DTYPES, layout=LAYOUTS, shape=SHAPES[1:4:2], per_sample=(False, True))
def magnitude(lab: Lab, dtype: str, layout: str, shape: tuple[int, ...], per_sample: bool) -> None:
    y, x, prev = (lab.draw(*shape, dtype=DTYPES[dtype]) for _ in range(3))
    want_out = torch.empty_like(y)
    want = reference.residual_magnitude(y, x, prev, want_out, 1e-3, per_sample)
    at_y, at_x, at_prev = (lab.place(t, layout) for t in (y, x, prev))
    plain = lab.kernels.residual_magnitude(at_y, at_x, at_prev, None, 1e-3, per_sample)
    got = lab.kernels.residual_magnitude(at_y, at_x, at_prev, at_prev, 1e-3, per_sample)
    close(got, want, 2e-6)
    torch.testing.assert_close(at_prev.cpu(), want_out, rtol=0, atol=0)
    assert torch.equal(got, plain), "storing the residual changes the mean"


@case(width=(1, 7, 96, 300, 512, 1024, 1500))
def magnitude_widths(lab: Lab, width: int) -> None:
    y, x, prev = (lab.draw(21, width) for _ in range(3))
    got = lab.kernels.residual_magnitude(lab.place(y), lab.place(x), lab.place(prev))
    close(got, reference.residual_magnitude(y, x, prev), 2e-6)


def modulations(lab: Lab, shape: tuple[int, ...], rows: str, dtype: torch.dtype) -> list[Tensor]:
    """scale and shift of x: [B, 1, C], [1, 1, C] or [B, T, C], or each of its own."""
    batch, _, width = shape
    sizes = {"sample": (batch, 1, width), "all": (1, 1, width), "token": shape}
    sizes["mixed"] = sizes["token"]
    scale, shift = sizes[rows], sizes["all" if rows == "mixed" else rows]
    return [lab.draw(*size, dtype=dtype) for size in (scale, shift)]


@case(dtype=DTYPES, layout=LAYOUTS, rows=("sample", "all", "token", "mixed"))
def modulated(lab: Lab, dtype: str, layout: str, rows: str) -> None:
    shape = (3, 41, 100)
    x, prev = (lab.draw(*shape, dtype=DTYPES[dtype]) for _ in range(2))
    by = modulations(lab, shape, rows, FP32 if rows == "all" else x.dtype)
    want_out, out = torch.empty_like(prev), lab.blank(*shape, dtype=prev.dtype, layout=layout)
    want = reference.modulated_l1(x, *by, prev, want_out)
    at_x, at_prev = lab.place(x, layout), lab.place(prev, layout)
    at = [lab.place(t) for t in by]
    got = lab.kernels.modulated_l1(at_x, *at, at_prev, out)
    step = {FP32: 1e-5, FP16: 2e-3, BF16: 2e-2}[x.dtype]  # one unit of the last place
    torch.testing.assert_close(out.cpu(), want_out, rtol=step, atol=step)
    close(got, want, 2e-6 if dtype == "fp32" else step)
    assert torch.equal(got, lab.kernels.modulated_l1(at_x, *at, at_prev)), (
        "storing changes the sums"
    )
    assert torch.equal(got, lab.kernels.modulated_l1(at_x, *at, at_prev, at_prev))
    torch.testing.assert_close(at_prev, out, rtol=0, atol=0)


@case(width=(1, 7, 64, 300, 512, 1024, 1500, 3072, 5120, 9001))
def modulated_widths(lab: Lab, width: int) -> None:
    x, prev = lab.draw(1, 5, width) + 30, lab.draw(1, 5, width)
    scale, shift = modulations(lab, x.shape, "all", FP32)
    want_out, out = torch.empty_like(prev), lab.blank(*prev.shape)
    want = reference.modulated_l1(x, scale, shift, prev, want_out)
    placed = [lab.place(t) for t in (x, scale, shift, prev)]
    close(lab.kernels.modulated_l1(*placed, out), want, 1e-5)
    torch.testing.assert_close(out.cpu(), want_out, rtol=1e-4, atol=1e-4)


@case(stored=("fp16", "bf16"))
def residual_is_rounded_to_the_stored_dtype_before_it_is_compared(lab: Lab, stored: str) -> None:
    y, x = (lab.draw(4, 1300).mul(8).round().div(8) for _ in range(2))
    prev = lab.draw(4, 1300, dtype=DTYPES[stored])
    want_out, out = torch.empty_like(prev), lab.blank(4, 1300, dtype=prev.dtype)
    for name in ("residual_l1", "residual_magnitude"):
        want = getattr(reference, name)(y, x, prev, want_out)
        got = getattr(lab.kernels, name)(lab.place(y), lab.place(x), lab.place(prev), out)
        close(got, want, 2e-6)
        lab.same(out, want_out)


@case()
def programs_stride_over_many_blocks(lab: Lab) -> None:
    """Three programs per sample: each takes several blocks, one of them the masked tail."""
    from fastcache.triton_kernels import reduction

    y, x, prev, other = (lab.draw(2, 5, 5003) for _ in range(4))
    placed = [lab.place(t) for t in (y, x, prev, other)]
    whole, reduction.PROGRAMS = reduction.PROGRAMS, 4
    try:
        for per_sample in (False, True):
            got = lab.kernels.residual_l1(*placed[:3], per_sample=per_sample)
            close(got, reference.residual_l1(y, x, prev, per_sample=per_sample), 2e-6)
            got = lab.kernels.residual_magnitude(*placed[:3], per_sample=per_sample)
            close(got, reference.residual_magnitude(y, x, prev, per_sample=per_sample), 2e-6)
            got = lab.kernels.guided_sums(placed[0], placed[1:], per_sample)
            close(got, guided_sums(y, [x, prev, other], per_sample), 1e-12)
    finally:
        reduction.PROGRAMS = whole


@case()
def reductions_leave_their_counters_at_zero(lab: Lab) -> None:
    from fastcache.triton_kernels.counters import RESULTS, counters

    # as many samples as a stream has counters, and more
    for samples in (3, RESULTS, RESULTS + 1):
        placed = [lab.place(lab.draw(samples, 5, 40)) for _ in range(4)]
        for per_sample in (False, True):
            lab.kernels.residual_l1(*placed[:3], per_sample=per_sample)
            lab.kernels.residual_magnitude(*placed[:3], per_sample=per_sample)
            lab.kernels.guided_sums(placed[0], placed[1:], per_sample)
            assert not counters(placed[0], RESULTS).any()


@case(per_sample=(False, True))
def results_go_where_they_are_wanted(lab: Lab, per_sample: bool) -> None:
    tensors = [lab.draw(2, 47, 100) for _ in range(3)]
    placed = [lab.place(t) for t in tensors]
    for name, width in (("residual_l1", 2), ("residual_magnitude", 1)):
        want = getattr(reference, name)(*tensors, per_sample=per_sample)
        kernel = getattr(lab.kernels, name)
        got = lab.blank(*want.shape)
        assert kernel(*placed, None, per_sample=per_sample, **{RESULT[name]: got}) is got
        assert got.shape[-1] == width
        close(got, want, 2e-6)
        nothing = [t[:, :0] for t in placed]
        kernel(*nothing, None, per_sample=per_sample, **{RESULT[name]: got})
        host = [t[:, :0] for t in tensors]
        close(got, getattr(reference, name)(*host, per_sample=per_sample), 0)


@case()
def more_blocks_than_programs(lab: Lab) -> None:
    n = 4096 * 514 + 17
    y, x, prev = (lab.draw(n) for _ in range(3))
    got = lab.kernels.residual_l1(lab.place(y), lab.place(x), lab.place(prev))
    close(got, reference.residual_l1(y, x, prev), 2e-6)


@case()
def sums_of_a_sample_do_not_depend_on_its_batch(lab: Lab) -> None:
    # with 16 dividing a sample Triton compiles one kernel for a batch and for a sample: the bits of
    # a sum are those of a layout, and another kernel may have another
    y, x, prev, other = (lab.place(lab.draw(3, 50, 304)) for _ in range(4))
    alone = [t[1:2] for t in (y, x, prev, other)]
    for op, rest in (("residual_l1", (None,)), ("residual_magnitude", (None, 1e-8))):
        kernel = getattr(lab.kernels, op)
        batched = kernel(y, x, prev, *rest, per_sample=True)
        assert torch.equal(batched[1:2], kernel(*alone[:3], *rest, per_sample=True))
        assert torch.equal(batched[1], kernel(*alone[:3], *rest))
    batched = lab.kernels.guided_sums(y, [x, prev, other], per_sample=True)
    assert torch.equal(batched[1:2], lab.kernels.guided_sums(alone[0], alone[1:]))


@case()
def nothing_to_do(lab: Lab) -> None:
    for shape in ((0,), (0, 5), (4, 0), (2, 0, 8), (2, 3, 0), (0, 3, 8)):
        t, out = (torch.empty(shape, device=lab.device) for _ in range(2))
        host = torch.empty(shape)
        lab.kernels.residual_store(out, t, t)
        lab.kernels.residual_apply(out, t, t)
        lab.kernels.linear_combine(out, [t, t], [1.0, 2.0])
        lab.kernels.taylor_update([t, out], t, 1.0, 2)
        lab.kernels.guidance_combine(torch.empty((2 * shape[0], *shape[1:])), t, t, t, 1.0, 1.0)
        scale = torch.empty(shape[:-1], device=lab.device)
        lab.kernels.quantize_store(out.to(E4M3), scale, t, t)
        lab.kernels.quantized_combine(out, t, [t.to(E4M3)], [scale], [1.0])
        assert not lab.kernels.guided_sums(t, [t, t]).any()
        for per_sample in (False, True):
            got = lab.kernels.residual_l1(t, t, t, out, per_sample)
            close(got, reference.residual_l1(host, host, host, None, per_sample), 0)
            if len(shape) < 2 or (per_sample and len(shape) < 3):
                continue
            for eps in (0.0, 1e-8):
                got = lab.kernels.residual_magnitude(t, t, t, out, eps, per_sample)
                want = reference.residual_magnitude(host, host, host, None, eps, per_sample)
                close(got, want, 0)


# --- quantised storage ---------------------------------------------------------------------------


@case(dtype=DTYPES, layout=LAYOUTS, width=(1, 7, 96, 513, 3000, 8200))
def quantized_store(lab: Lab, dtype: str, layout: str, width: int) -> None:
    y, x = (lab.draw(2, 3, width, dtype=DTYPES[dtype]) for _ in range(2))
    y[0, 1] = x[0, 1]
    at_y, at_x = lab.place(y, layout), lab.place(x, layout)
    for minus, at_minus in ((x, at_x), (None, None)):
        want, want_scale = quantize_store(y, minus)
        q = lab.blank(2, 3, width, dtype=E4M3, layout=layout)
        scale = lab.blank(2, 3)
        lab.kernels.quantize_store(q, scale, at_y, at_minus)
        close(scale, want_scale, 0)
        close(q.float(), want.float(), 0)


@case()
def quantized_rows_with_extreme_values(lab: Lab) -> None:
    y = torch.ones(6, 300)
    y[0, 7], y[1, 7], y[2, 7] = NAN, math.inf, -math.inf
    y[3] = 1e-37
    y[4] = torch.linspace(-1, 1, 300) * 3e38
    y[5] = 0
    want, want_scale = quantize_store(y, None)
    q, scale, out = lab.blank(6, 300, dtype=E4M3), lab.blank(6), lab.blank(6, 300)
    lab.kernels.quantize_store(q, scale, lab.place(y), None)
    close(scale, want_scale, 0)
    close(q.float(), want.float(), 0)
    lab.kernels.quantized_combine(out, None, [q], [scale], [1.0])
    close(out, quantized_combine(None, [want], [want_scale], [1.0]), 0)
    assert out[:3].isnan().all()
    assert not out[3].any()
    assert ((out[4].cpu() - y[4]).abs() <= 3e38 / 28 * 1.001).all()


@case()
def every_e4m3_value_and_every_tie_converts(lab: Lab) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)[None]
    out = lab.blank(1, 256)
    lab.kernels.quantized_combine(out, None, [lab.place(codes)], [lab.place(torch.ones(1))], [1.0])
    close(out, codes.float(), 0)
    exact = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = torch.cat([(exact[1:] + exact[:-1]) / 2, exact])
    y = torch.cat([ties, -ties, ties.nextafter(torch.tensor(0.0)), ties * (1 + 2**-20)])
    y = y.clamp(-448, 448)[None]
    q = lab.blank(1, y.shape[1], dtype=E4M3)
    lab.kernels.quantize_store(q, lab.blank(1), lab.place(y), None)
    close(q.float(), y.to(E4M3).float(), 0)


@case(dtype=DTYPES, layout=LAYOUTS, on_device=(False, True))
def quantized_sum(lab: Lab, dtype: str, layout: str, on_device: bool) -> None:
    base, *rest = (lab.draw(2, 5, 700, dtype=DTYPES[dtype]) for _ in range(4))
    qs, scales = zip(*(quantize_store(t, None) for t in rest), strict=True)
    weights = [1.5, -0.25, 0.3]
    given = torch.tensor(weights, device=lab.device) if on_device else weights
    at_qs, at_scales = [lab.place(q, layout) for q in qs], [lab.place(s) for s in scales]
    for start in (base, None):
        want = quantized_combine(start, qs, scales, weights).to(base.dtype)
        out = lab.blank(2, 5, 700, dtype=base.dtype, layout=layout)
        if start is not None:
            out.copy_(base)
        at_base = None if start is None else out
        lab.kernels.quantized_combine(out, at_base, at_qs, at_scales, given)
        lab.same(out, want)


# --- guided prediction ---------------------------------------------------------------------------


@case(dtype=DTYPES, order=(1, 2, 3), layout=LAYOUTS, per_sample=(False, True))
def sums(lab: Lab, dtype: str, order: int, layout: str, per_sample: bool) -> None:
    guide, *guides = (lab.draw(2, 19, 300, dtype=DTYPES[dtype]) for _ in range(order + 2))
    placed = [lab.place(t, layout) for t in (guide, *guides)]
    got = lab.kernels.guided_sums(placed[0], placed[1:], per_sample)
    close(got, guided_sums(guide, guides, per_sample), 1e-12)
    strided = [t[:, ::4] for t in placed]
    got = lab.kernels.guided_sums(strided[0], strided[1:], per_sample)
    close(got, guided_sums(guide[:, ::4], [t[:, ::4] for t in guides], per_sample), 1e-12)
    assert torch.equal(got, lab.kernels.guided_sums(strided[0], strided[1:], per_sample))


@case(order=(1, 2, 3), base=(False, True), ridge=(0.0, 0.003, 1e9))
def weights_and_misfit(lab: Lab, order: int, base: bool, ridge: float) -> None:
    guide, *guides = (lab.draw(3, 11, 64) for _ in range(order + 2))
    prior = torch.tensor([0.7, -0.1, 0.3][:order])
    want_sums = guided_sums(guide, guides, per_sample=True)
    w, misfit = guided_solve(want_sums, prior, ridge)
    got_sums = lab.kernels.guided_sums(lab.place(guide), [lab.place(t) for t in guides], True)
    for given in (got_sums, got_sums.float()):
        weights, got_misfit = lab.kernels.guided_solve(given, lab.place(prior), ridge, base)
        padded = torch.nn.functional.pad(w, (1, 1))
        want = padded[:, 1:] - padded[:, :-1]
        want[:, 0] += 1
        if base:
            want = torch.nn.functional.pad(want, (1, 0), value=1.0)
        assert weights.shape == want.shape and weights.dtype == FP32
        torch.testing.assert_close(weights.cpu().double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_misfit.cpu().double(), misfit, rtol=1e-5, atol=1e-5)


@case(order=(1, 2, 3), share=(0.0, 1e-4, 1e-2))
def a_small_misfit_survives_cancellation(lab: Lab, order: int, share: float) -> None:
    """q lies in the span of the history up to a small part: float32 sums would lose the misfit."""
    guides = [lab.draw(2, 40, 96, dtype=FP32) for _ in range(order + 1)]
    d = [a - b for a, b in pairwise(guides)]
    guide = guides[0] + 0.6 * d[0] + share * lab.draw(2, 40, 96)
    prior = torch.zeros(order)
    _, want = guided_solve(guided_sums(guide, guides), prior, 0.0)
    got_sums = lab.kernels.guided_sums(lab.place(guide), [lab.place(t) for t in guides])
    weights, misfit = lab.kernels.guided_solve(got_sums, lab.place(prior), 0.0)
    torch.testing.assert_close(misfit.cpu().double(), want, rtol=1e-5, atol=1e-7)
    assert abs(weights[0, 0].item() - 1.6) < 1e-5 + share


@case(ridge=(0.0, 0.003))
def a_useless_history_falls_back_to_the_prior(lab: Lab, ridge: float) -> None:
    one, two = lab.draw(2, 300), lab.draw(2, 300)
    still = [one] * 4
    broken = [one, two, torch.full_like(one, NAN), one]
    endless = [one, two, torch.full_like(one, math.inf), one]
    parallel = [one, one - two, one - 2 * two, one - 3 * two]
    for guides, falls_back in (
        (still, True),
        (broken, True),
        (endless, True),
        (parallel, ridge == 0),
    ):
        for order in (1, 2, 3):
            prior = torch.tensor([0.7, -0.1, 0.3][:order])
            placed = [lab.place(t) for t in guides[: order + 1]]
            got_sums = lab.kernels.guided_sums(lab.place(two + one), placed)
            weights, misfit = lab.kernels.guided_solve(got_sums, lab.place(prior), ridge)
            assert weights.isfinite().all()
            if falls_back and (order > 1 or guides is still):
                want = {1: [1.7, -0.7], 2: [1.7, -0.8, 0.1], 3: [1.7, -0.8, 0.4, -0.3]}[order]
                torch.testing.assert_close(weights.cpu(), torch.tensor([want]))
                assert misfit.isnan().item() == (not got_sums.isfinite().all())


@case(order=(2, 3), streams=(1, 3))
def weights_that_are_checked(lab: Lab, order: int, streams: int) -> None:
    for _ in range(4):
        guides = [lab.draw(1, 11, 16) for _ in range(order + 2)]
        kept = [[lab.draw(1, 7, 16) for _ in range(order + 1)] for _ in range(streams)]
        prior, before = lab.draw(order), lab.draw(order - 1)
        sums, *values = (guided_sums(g[0], g[1:]) for g in (guides, *kept))
        if lab.seed % 2:  # what came is what the guides told, or what the prior did
            values = [2 * values[0], *values[1:]]
        want = reference.guided_check(sums, values, prior, before, 0.05)
        given = [t.to(lab.device) for t in (sums, *values)]
        at = lab.place(prior), lab.place(before)
        got = lab.kernels.guided_check(given[0], given[1:], *at, 0.05)
        for value, wanted in zip(got, want, strict=True):
            assert value.shape == wanted.shape and value.dtype == FP32
            torch.testing.assert_close(value.cpu(), wanted, rtol=1e-5, atol=1e-5)
    for broken in (0.0, NAN, math.inf):
        spoilt = [torch.full_like(v, broken) for v in given[1:]]
        got, _ = lab.kernels.guided_check(given[0], spoilt, *at, 0.05)
        alone, _ = lab.kernels.guided_solve(given[0], at[0], 0.05, True)
        assert torch.equal(got, alone)


@case(
    rates=(
        (0.9, 0.6),
        (1.08, 0.8),
        (0.7, 0.7),
        (0.8 + 0.3j,),
        (-0.2 + 0.5j,),
        (-0.5, 0.8),
        (1.0, 0.5),
    ),
    ahead=(0.25, 1.0, 2.75),
)
def exponentials(lab: Lab, rates: tuple, ahead: float) -> None:
    one, two = rates[0], rates[-1].conjugate()
    a, b, c = (lab.draw(24).double() for _ in range(3))
    for noise, windows, ridge in ((0.0, 1, 1e-8), (0.03, 3, 1e-8), (0.03, 2, 0.05)):
        values = []
        for i in range(windows + 3):
            turned = a + (b + 1j * c) * one ** (-i) + (b - 1j * c) * two ** (-i)
            values.append(turned.real + noise * lab.draw(24).double())
        sums = [guided_sums(values[i], values[i + 1 : i + 4]) for i in range(windows)]
        want = reference.exponential_solve(sums, torch.tensor([ahead]), ridge)
        given = [t.to(lab.device) for t in sums]
        got = lab.kernels.exponential_solve(given, lab.place(torch.tensor([ahead])), ridge)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
    for broken in (0.0, NAN, math.inf):
        spoilt = [torch.full_like(t, broken) for t in given]
        got = lab.kernels.exponential_solve(spoilt, lab.place(torch.tensor([ahead])), 1e-8)
        torch.testing.assert_close(got.cpu(), torch.tensor([1.0, 1 + ahead, -ahead, 0.0]))


@case(turned=(False, True))
def weights_of_guides_in_a_layout_that_no_kernel_takes(lab: Lab, turned: bool) -> None:
    """The kernel read [B, F, T, C] as if its rows were next to each other, and gave other weights."""

    def view(t: Tensor) -> Tensor:
        return t.transpose(2, 3)[:, 0] if turned else t[..., ::4, :]

    tensors, prior = [lab.draw(2, 3, 10, 24) for _ in range(4)], torch.tensor([1.5, 0.0])
    guide, *guides = map(view, tensors)
    expected = reference.guided_solve(reference.guided_sums(guide, guides), prior, 0.003, True)
    guide, *guides = (view(t.to(lab.device)) for t in tensors)
    with fastcache.backend("triton"):
        got = fastcache.ops.guided_weights(guide, guides, prior.to(lab.device), 0.003)
    for value, want in zip(got, expected, strict=True):
        close(value, want, 1e-5)


# --- the child process and the tests -------------------------------------------------------------


def run(name: str, kernels: ModuleType, device: str) -> str:
    """Empty, or the traceback of the case's failure."""
    lab = Lab(kernels, device)
    try:
        CASES[name](lab)
        lab.check_surroundings()
    except Exception:
        return traceback.format_exc()
    return ""


def serve() -> None:
    from fastcache import triton_kernels

    for line in sys.stdin:
        print(json.dumps(run(line.rstrip("\n"), triton_kernels, "cpu")), flush=True)


@dataclass
class Interpreter:
    """A child process that runs cases one at a time."""

    process: subprocess.Popen[str]

    def __call__(self, name: str) -> str:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else "the interpreter died"


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__))]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    yield Interpreter(process)
    process.stdin.close()
    process.wait(30)


def _version(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version(package).split(".")[:2])
    except metadata.PackageNotFoundError:
        return (0, 0)


@pytest.mark.skipif(_version("triton") == (0, 0), reason="triton is not installed")
@pytest.mark.skipif(
    _version("triton") < (3, 7) and _version("numpy") >= (2, 4),
    reason="the interpreter of this triton cannot run loops with this numpy",
)
@pytest.mark.parametrize("name", CASES)
def test_interpreted(interpreter: Interpreter, name: str) -> None:
    failure = interpreter(name)
    assert not failure, failure


def test_import_touches_no_device_and_refuses_another_name() -> None:
    pytest.importorskip("triton")
    code = (
        "import sys, fastcache.triton_kernels as k, torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=root, capture_output=True, text=True
    )
    assert "fastcache.triton_kernels" in found.stderr


if __name__ == "__main__":
    serve()
