# SPDX-License-Identifier: Apache-2.0
"""Are the results right: ops at model size, layouts, small models, then the tests for a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastcache
from fastcache import ops
from fastcache.ops import dispatch

from .. import common
from ..chains import OPS, Op
from ..common import Row
from ..ops import DTYPES, LARGE, QUICK, SHAPES, buffers
from . import tests
from .session import Session

# of a result: bits may differ by the last one or two; of sums over a whole tensor; of solved weights
CLOSE = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
SUMS, WEIGHTS = 3e-6, 1e-3
MODELS = ("Flux", "Wan3D", "HunyuanVideo", "SkyReelsV2")
STEPS = 6


def run(session: Session) -> None:
    shapes = QUICK if session.dry else {"FLUX": SHAPES["FLUX"], **LARGE}
    for backend in kernels_of(session.device):
        for model, shape in shapes.items():
            for dtype in DTYPES:
                cell = {"backend": backend, "model": model, "dtype": dtype}
                with session.attempt("ops", **cell):
                    report(session, "ops", cell, ops_agree(backend, shape, dtype, session.device))
    for layout, places in LAYOUTS.items():
        for dtype in DTYPES:
            cell = {"layout": layout, "dtype": dtype}
            with session.attempt("layouts", **cell):
                small = session.dry
                found = layouts_agree(places, DTYPES[dtype], session.device, small)
                report(session, "layouts", cell, found)
    for name in MODELS[:2] if session.dry else MODELS:
        for stored in (None, torch.float8_e4m3fn):
            cell = {"model": name, "cache_dtype": str(stored)}
            with session.attempt("models", **cell):
                report(session, "models", cell, model_agrees(name, stored, session.device))
    tests.run(
        session, ["test_native_cuda"] if session.dry else ["test_triton_gpu", "test_native_cuda"]
    )


def kernels_of(device: str) -> list[str]:
    """The backends with kernels of their own that work on a device."""
    wanted = ("triton", "cuda") if device == "cuda" else ("cpp",)
    return [name for name in wanted if dispatch.status(name) is True]


def report(session: Session, name: str, cell: Row, found: Row) -> None:
    """One row; what is wrong makes it a failure."""
    if found["wrong"]:
        session.fail(name, f"wrong: {', '.join(map(str, found['wrong']))}", **cell, **found)
    else:
        session.row(name, **cell, **found)


# --- ops at model size ----------------------------------------------------------------------------------


def ops_agree(backend: str, shape: tuple[int, int], dtype: str, device: str) -> Row:
    """Every op against the reference on the same device, its output full of NaN before."""
    wrong, equal, worst = [], 0, 0.0
    for op in OPS:
        given = buffers(op, shape, DTYPES[dtype], device, count=1)[0]
        want, got = (_results(op, name, given) for name in ("reference", backend))
        errors = [_error(a, b) for a, b in zip(got, want, strict=True)]
        limits = [_limit(op, t) for t in want]
        equal += all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        worst = max(worst, *errors)
        if any(not e <= limit for e, limit in zip(errors, limits, strict=True)):
            wrong.append(f"{op.name} by {max(errors):.2g}")
    return {"checked": len(OPS), "equal": equal, "worst": worst, "wrong": wrong}


def _results(op: Op, backend: str, given: dict[str, Tensor]) -> list[Tensor]:
    own = {name: t.clone() for name, t in given.items()}
    if "out" in own:
        own["out"].fill_(torch.nan)
    with fastcache.backend(backend):
        returned = op.ours(own)
    results = [own[op.result]] if op.result else []
    return results + ([returned] if isinstance(returned, Tensor) else [])


def _error(got: Tensor, want: Tensor) -> float:
    """Largest difference beside the largest value; NaN where one is NaN."""
    a, b = got.float(), want.float()
    return ((a - b).abs().amax() / b.abs().amax().clamp_min(1e-30)).item()


def _limit(op: Op, result: Tensor) -> float:
    if result.numel() > 16:
        return CLOSE[result.dtype]
    return WEIGHTS if op.name.startswith("guided") else SUMS


# --- layouts --------------------------------------------------------------------------------------------

Place = Callable[[Tensor], Tensor]  # a [B, T, C] tensor with the same values, laid out otherwise


def _transposed(t: Tensor) -> Tensor:
    """Strides (T C, 1, T), as behind a patch embedding."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _range(t: Tensor) -> Tensor:
    """The last tokens of a longer sequence."""
    return torch.cat([t, t], 1)[:, t.shape[1] :]


LAYOUTS: dict[str, tuple[Place, Place]] = {  # of the block's output and residuals, of its input
    "contiguous": (Tensor.contiguous, Tensor.contiguous),
    "transposed": (_transposed, _transposed),
    "transposed input": (Tensor.contiguous, _transposed),
    "token range": (_range, _range),
}


def layouts_agree(places: tuple[Place, Place], dtype: torch.dtype, device: str, small: bool) -> Row:
    """Ops on tensors of one layout, whatever backend takes them, against the reference."""
    g = torch.Generator(device).manual_seed(0)
    size = (2, 24, 32) if small else (2, 1024, 3072)

    def draw(place: Place) -> Tensor:
        return place(torch.randn(size, generator=g, device=device).to(dtype))

    y, x, prev = draw(places[0]), draw(places[1]), draw(places[0])
    wrong, ran = [], {}
    for name, call in layout_cases(y, x, prev).items():
        with fastcache.backend("reference"):
            want = call()
        got = call()
        limit = SUMS if want.numel() <= 16 else CLOSE.get(want.dtype, 0.0)
        if not (error := _error(got, want)) <= limit:
            wrong.append(f"{name} by {error:.2g}")
        ran[name] = dispatch.resolve(name, [y, x, prev])[0].__module__.rpartition(".")[2]
    return {"ran": ran, "wrong": wrong}


def layout_cases(y: Tensor, x: Tensor, prev: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What every step of some method calls; new outputs, which nothing has zeroed."""

    def out(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device).fill_(torch.nan)

    with fastcache.backend("reference"):
        q, scale = ops.quantize_store(y, x)
    each = torch.tensor([[1.5, -0.75, 0.25], [0.5, 2.0, -1.0]], device=y.device)
    return {
        "residual_l1": lambda: ops.residual_l1(y, x, prev),
        "residual_magnitude": lambda: ops.residual_magnitude(y, x, prev),
        "residual_store": lambda: ops.residual_store(y, x, out(y)),
        "residual_apply": lambda: ops.residual_apply(x, prev, out(x)),
        "linear_combine": lambda: ops.linear_combine([y, x, prev], [1.5, -0.75, 0.25], out(y)),
        "combine_samples": lambda: ops.linear_combine([y, x, prev], each, out(y)),
        "quantize_store": lambda: _restored(*ops.quantize_store(y, x)),
        "quantized_combine": lambda: ops.quantized_combine(x, [q], [scale], [1.0], out(x)),
    }


def _restored(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale[..., None]


# --- small models ---------------------------------------------------------------------------------------


def model_agrees(name: str, stored: torch.dtype | None, device: str) -> Row:
    """A run of one of the tests' models, on the kernels and on the reference alone."""
    want, got = (_outputs(name, stored, device, backend) for backend in ("reference", "auto"))
    errors = [_error(a, b) for a, b in zip(got, want, strict=True)]
    wrong = [f"step {i} by {e:.2g}" for i, e in enumerate(errors) if not e <= 0.02]
    return {"worst": max(errors), "wrong": wrong}


def _outputs(name: str, stored: Any, device: str, backend: str) -> list[Tensor]:
    sys.path.insert(0, str(common.ROOT / "tests"))
    import tiny

    model, inputs = tiny.build(name)
    model, outputs = model.to(device), []
    recipe = fastcache.Recipe(fastcache.Interval(3), fastcache.Reuse())
    with fastcache.enable(model, recipe, cache_dtype=stored, backend=backend) as cache:
        for i, step in enumerate(tiny.trajectory(name, inputs, STEPS)):
            step = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), step)
            with cache.context("cond", step_index=i):
                outputs.append(model(**step, return_dict=False)[0].clone())
    return outputs
