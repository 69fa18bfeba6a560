# SPDX-License-Identifier: Apache-2.0
"""Forecasts by Hermite and Chebyshev polynomials and by exponentials, against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch._dynamo as dynamo
import toys
from torch import Tensor
from torch._dynamo.utils import counters

import fastcache
from fastcache import DMD, Chebyshev, FirstBlock, Hermite, Interval, Mask, Modules, Recipe, Taylor
from fastcache.ops import reference
from fastcache.storage.ring import weighted

STEPS = 20
HISTORIES = [(3,), (4, 3), (9, 6, 3), (12, 9, 6, 3), (13, 9, 8, 4, 0), (17, 14, 11, 8, 5, 2)]


def table(values: np.ndarray, steps: tuple[int, ...], order: int) -> list[np.ndarray]:
    """A table of differences as it is refreshed step by step, oldest first, each over the latest gap."""
    factors: list[np.ndarray] = []
    previous = None
    for value, step in sorted(zip(values, steps, strict=True), key=lambda pair: pair[1]):
        new = [value]
        for old in factors[:order]:
            new.append((new[-1] - old) / (step - previous))
        factors, previous = new, step
    return factors


@pytest.mark.parametrize("steps", HISTORIES)
@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("scale", [0.25, 0.5, 0.9])
def test_hermite_replaces_the_powers_of_taylor(steps, order, scale):
    steps = steps[: order + 1]
    values = np.random.default_rng(order).normal(size=(len(steps), 7))
    factors = table(values, steps, order)
    for offset in (1, 2, 5):
        basis = np.polynomial.hermite.hermvander(np.array([scale * offset]), order)[0]
        wanted = sum(
            f * scale**k * basis[k] / math.factorial(k) for k, f in enumerate(factors[: order + 1])
        )
        weights = Hermite(order, scale).weights(steps, steps[0] + offset)
        np.testing.assert_allclose(np.array(weights) @ values, wanted, rtol=1e-12, atol=1e-12)


def test_hermite_of_order_1_takes_a_share_of_the_slope():
    # H_1(y) = 2 y: scale * 2 * scale * x = x / 2 at the usual scale, with the sign of the offset
    assert Hermite(1).weights((4, 2), 6) == (1.5, -0.5)
    assert Taylor(1).weights((4, 2), 6) == (2.0, -1.0)


@pytest.mark.parametrize("steps", HISTORIES)
@pytest.mark.parametrize(
    "degree, ridge", [(4, 0.1), (2, 0.1), (4, 1e-3), (1, 10.0), (0, 0.5), (3, 0.0)]
)
@pytest.mark.parametrize("total", [28, 50, None])
def test_chebyshev_is_a_ridge_regression_over_the_run(steps, degree, ridge, total):
    if len(steps) == 1:
        assert Chebyshev(degree, ridge).weights(steps, steps[0] + 1, total) == (1.0,)
        return
    step = steps[0] + 2
    tau = 2 * np.array(steps) / (total or step) - 1
    at = 2 * step / (total or step) - 1
    polynomials: list[Callable] = [
        lambda x: 1 + 0 * x, lambda x: x, lambda x: 2 * x**2 - 1, lambda x: 4 * x**3 - 3 * x,
        lambda x: 8 * x**4 - 8 * x**2 + 1,
    ][: degree + 1]  # fmt: skip
    values = np.random.default_rng(7).normal(size=(len(steps), 5))
    # the ridge as rows of a plain least-squares problem
    rows = np.concatenate(
        [np.stack([p(tau) for p in polynomials], 1), math.sqrt(ridge) * np.eye(degree + 1)]
    )
    found, *_ = np.linalg.lstsq(
        rows, np.concatenate([values, np.zeros((degree + 1, 5))]), rcond=None
    )
    wanted = np.array([p(at) for p in polynomials]) @ found
    weights = Chebyshev(degree, ridge, 7).weights(steps, step, total)
    np.testing.assert_allclose(np.array(weights) @ values, wanted, rtol=1e-7, atol=1e-7)


def modes(values: np.ndarray, ahead: float, ridge: float) -> np.ndarray:
    """The forecast of values, newest first, by a singular value and an eigenvalue decomposition in full space."""
    d = values[:-1] - values[1:]  # newest first
    n = len(d)
    x = np.concatenate([np.stack([d[i + 2], d[i + 1]], 1) for i in range(n - 2)])
    y = np.concatenate([np.stack([d[i + 1], d[i]], 1) for i in range(n - 2)])
    last = np.concatenate([d[i] for i in range(n - 2)])
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = 1 + int(s[1] >= 1e-4 * s[0])
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    damped = s / (s**2 + ridge * (x**2).sum() / 2)  # of the ridge system
    small = np.diag(damped) @ u.T @ y @ vt.T
    z, w = np.linalg.eig(small.astype(complex))
    gains = np.array([ahead if abs(v - 1) < 1e-9 else (v**ahead - 1) / (v - 1) for v in z])
    along = np.diag(damped) @ u.T @ last
    both = vt.T @ (w @ np.diag(gains) @ np.linalg.inv(w) @ along).real
    return values[0] + d[1] * both[0] + d[0] * both[1]


def exponentials(
    rates: tuple[complex, ...], count: int, seed: int = 0
) -> Callable[[float], np.ndarray]:
    g = np.random.default_rng(seed)
    parts = g.normal(size=(3, count))
    if isinstance(rates[0], complex):
        return lambda t: parts[0] + ((parts[1] + 1j * parts[2]) * rates[0] ** t).real
    if len(rates) == 1:
        return lambda t: parts[0] + parts[1] * rates[0] ** t
    return lambda t: parts[0] + parts[1] * rates[0] ** t + parts[2] * rates[1] ** t


def forecast(values: np.ndarray, ahead: float, ridge: float = 1e-8) -> np.ndarray:
    rows = [torch.tensor(v, dtype=torch.float32) for v in values]
    weights = torch.ops.fastcache._exponential_weights(rows, torch.tensor([ahead]), ridge)
    assert weights[0] == 1 and weights.dtype == torch.float32
    return weights[1:].double().numpy() @ np.stack(values[:3])


each_backend = pytest.mark.parametrize(
    "backend", [n for n in ("reference", "cpp") if fastcache.backends()[n] is True]
)


@each_backend
@pytest.mark.parametrize("ahead", [1 / 3, 2 / 3, 1.0, 1.75, 3.0])
@pytest.mark.parametrize("keep", [4, 5, 8])
@pytest.mark.parametrize(
    "rates", [(0.9, 0.6), (1.08, 0.8), (0.7,), (0.9 + 0.3j,), (-0.5, 0.8), (1.0, 0.5)]
)
def test_exponentials_are_continued_exactly(backend, ahead, keep, rates):
    at = exponentials(rates, 96)
    values = np.stack([at(-i) for i in range(keep)])
    with fastcache.backend(backend):
        found = forecast(values, ahead, 0.0)
    wanted = modes(values, ahead, 0.0)
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(values).max())
    if rates[0] != -0.5:  # parts of a gap of a sign that alternates are no real number
        np.testing.assert_allclose(wanted, at(ahead), atol=1e-6)


@each_backend
@pytest.mark.parametrize("ahead", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("keep", [4, 6])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ridge", [1e-8, 0.05])
def test_the_fit_equals_a_decomposition_in_full_space(backend, ahead, keep, seed, ridge):
    g = np.random.default_rng(seed)
    smooth = exponentials((0.95, 0.7), 200, seed)
    values = np.stack([smooth(-i) + 0.05 * g.normal(size=200) for i in range(keep)])
    if ridge > 1e-6:  # the recurrence itself, solved; eigenvalues from numpy
        d = values[:-1] - values[1:]
        x = np.concatenate([np.stack([d[i + 2], d[i + 1]], 1) for i in range(keep - 3)])
        last = np.concatenate([d[i] for i in range(keep - 3)])
        gram = x.T @ x
        c = np.linalg.solve(gram + ridge * np.trace(gram) / 2 * np.eye(2), x.T @ last)
        z, w = np.linalg.eig(np.array([[0, c[0]], [1, c[1]]], dtype=complex))
        both = (w @ np.diag((z**ahead - 1) / (z - 1)) @ np.linalg.inv(w) @ c).real
        wanted = values[0] + d[1] * both[0] + d[0] * both[1]
    else:
        wanted = modes(values, ahead, ridge)
    with fastcache.backend(backend):
        np.testing.assert_allclose(forecast(values, ahead, ridge), wanted, atol=1e-3)


@each_backend
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_a_history_without_a_direction_gives_the_line(backend, value):
    rows = [torch.full((1, 4, 4), value)] * 4
    with fastcache.backend(backend):
        weights = torch.ops.fastcache._exponential_weights(rows, torch.tensor([0.5]), 1e-8)
    assert weights.tolist() == [1.0, 1.5, -0.5, 0.0]


def test_the_device_is_told_whether_the_history_can_be_fitted():
    assert DMD().weights((3,), 4) == (0.0, 0.0)
    assert DMD().weights((6, 3, 2, 1), 7) == (1 / 3, 0.0)
    assert DMD().weights((12, 9, 6), 13) == (1 / 3, 0.0)
    assert DMD().weights((12, 9, 6, 3), 14) == (2 / 3, 1.0)
    assert DMD(5).weights((12, 9, 6, 3), 14) == (2 / 3, 0.0)


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: Hermite(5), "order"),
        (lambda: Hermite(1, 0.0), "scale"),
        (lambda: Hermite(1, 1.0), "scale"),
        (lambda: Hermite(1, float("nan")), "scale"),
        (lambda: Chebyshev(-1), "degree"),
        (lambda: Chebyshev(ridge=-1), "ridge"),
        (lambda: Chebyshev(keep=8), "keep"),
        (lambda: Chebyshev(keep=0), "keep"),
        (lambda: DMD(3), "keep"),
        (lambda: DMD(ridge=float("inf")), "ridge"),
    ],
)
def test_bad_fields_are_named(make, field):
    with pytest.raises(ValueError, match=field):
        make()


# --- whole runs ------------------------------------------------------------------------------------------


def lines_up(keep: int) -> Callable[[list[Tensor], tuple[int, ...], int], Tensor]:
    def exponential(rows: list[Tensor], steps: tuple[int, ...], step: int) -> Tensor:
        gaps = [a - b for a, b in pairwise(steps)]
        ahead = (step - steps[0]) / gaps[0] if gaps else 0.0
        if len(steps) < keep or len(set(gaps)) > 1:
            return rows[0] + ahead * (rows[0] - rows[1]) if gaps else rows[0]
        seen = np.stack([r[..., ::4, :].numpy().ravel() for r in rows])
        # weights of the whole rows from those of the tokens that are looked at
        weights = np.linalg.lstsq(
            np.stack([seen[0] - seen[1], seen[1] - seen[2]], 1),
            modes(seen, ahead, 1e-8) - seen[0],
            rcond=None,
        )[0]
        return rows[0] + weights[0] * (rows[0] - rows[1]) + weights[1] * (rows[1] - rows[2])

    return exponential


def summed(weights: Callable) -> Callable[[list[Tensor], tuple[int, ...], int], Tensor]:
    return lambda rows, steps, step: sum(
        w * r for w, r in zip(weights(steps, step), rows, strict=False)
    )


FORECASTS = {
    "hermite": (Hermite(2), 3, summed(lambda s, t: Hermite(2).weights(s, t))),
    "chebyshev": (Chebyshev(), 6, summed(lambda s, t: Chebyshev().weights(s, t, STEPS))),
    "chebyshev 7": (
        Chebyshev(3, 0.01, 7),
        7,
        summed(lambda s, t: Chebyshev(3, 0.01, 7).weights(s, t, STEPS)),
    ),
    "dmd": (DMD(), 4, lines_up(4)),
    "dmd 6": (DMD(6), 6, lines_up(6)),
}
PLANS = {
    "every 3rd": [int(i < 4 or i % 3 == 0) for i in range(STEPS)],
    "uneven": [int(i < 3 or i in (5, 6, 9, 12, 13, 17)) for i in range(STEPS)],
}


def by_hand(
    model: toys.Model, calls: list[dict], plan: list[int], depth: int, rule: Callable
) -> list[Tensor]:
    """The outputs of a run whose stack is forecast in float64 from the residuals of computed steps."""
    outputs, rows, steps = [], [], ()
    for i, call in enumerate(calls):
        hidden = model.embed(call["hidden_states"])
        hidden = hidden + 0.1 * torch.sin(call["timestep"] / 300).reshape(-1, 1, 1)
        if plan[i]:
            left, _ = model.through(hidden, None)
            rows, steps = [(left - hidden).double(), *rows][:depth], (i, *steps)[:depth]
        else:
            left = (hidden.double() + rule(rows, steps, i)).float()
        outputs.append(model.proj_out(left))
    return outputs


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", FORECASTS)
def test_a_run_equals_the_formula_in_float64(name, plan):
    what, depth, rule = FORECASTS[name]
    model, calls = toys.model(), toys.inputs(STEPS, speed=0.05)
    with torch.no_grad():
        wanted = by_hand(model, calls, PLANS[plan], depth, rule)
    with fastcache.enable(model, Recipe(Mask(PLANS[plan]), what)) as cache:
        found = toys.run(cache, model, calls, num_inference_steps=STEPS)
        assert toys.actions(cache) == "".join("C" if c else "." for c in PLANS[plan])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FORECASTS)
@pytest.mark.parametrize("where", ["stack", "modules", "first block"])
def test_compiled_runs_equal_eager_ones_with_one_graph_per_mode(name, where):
    what = FORECASTS[name][0]
    when = FirstBlock(0.1, max_skips=3) if where == "first block" else Interval(3)
    recipe = Recipe(when, what, Modules() if where == "modules" else None)
    calls = toys.inputs(STEPS, speed=0.02 if where == "first block" else 0.12)
    model = toys.model()
    with fastcache.enable(model, recipe) as cache:
        wanted = toys.run(cache, model, calls, num_inference_steps=STEPS)
        steps = toys.actions(cache)
        assert "." in steps and steps.count("C") > 5
    dynamo.reset()
    counters.clear()
    with fastcache.enable(model, recipe) as cache:
        compiled = fastcache.compile(model, backend="eager")
        for _ in range(2):
            found = []
            for i, call in enumerate(calls):
                with cache.context(step_index=i, num_inference_steps=STEPS), torch.no_grad():
                    found.append(compiled(**call).clone())
            cache.reset()
        assert toys.actions(cache) == 2 * steps
    assert not counters["recompiles"] and not counters["graph_break"]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_what_cached_values_are_kept_in(dtype):
    model, calls = toys.model(), toys.inputs(STEPS, speed=0.05)
    for what in (Hermite(2), Chebyshev(), Chebyshev(keep=7), DMD()):
        recipe = Recipe(Interval(3), what)
        if dtype == torch.float8_e4m3fn and what.fitted is not None:
            with pytest.raises(ValueError, match="DMD"):
                fastcache.enable(model, recipe, cache_dtype=dtype)
            continue
        with fastcache.enable(model, recipe, cache_dtype=dtype) as cache:
            found = toys.run(cache, model, calls, num_inference_steps=STEPS)
        with fastcache.enable(model, recipe) as cache:
            wanted = toys.run(cache, model, calls, num_inference_steps=STEPS)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
        # a fit to differences of neighbours sees their rounding
        sure = dtype == torch.bfloat16 and what.fitted is None
        assert 0 < max(errors) < (0.05 if sure else 0.3), what


@pytest.mark.parametrize("count", (*range(1, 12), 17, 24))
@pytest.mark.parametrize("with_base", [False, True])
def test_sums_of_any_length_are_chained(count, with_base):
    g = torch.Generator().manual_seed(count)
    rows = [torch.randn(3, 4, generator=g) for _ in range(count)]
    weights = [(-1.0) ** i * (i + 1) for i in range(count)]
    base = torch.randn(3, 4, generator=g) if with_base else None
    wanted = sum(w * r.double() for w, r in zip(weights, rows, strict=True))
    wanted = wanted if base is None else wanted + base
    found = weighted(rows, weights, base, torch.float32).double()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)
    for at in range(count) if base is None else ():  # into a row that is one of the terms
        copies = [row.clone() for row in rows]
        out = copies[at]
        assert weighted(copies, weights, None, torch.float32, out) is out
        torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("count", [1, 5, 6, 8, 9, 13])
def test_a_kernel_of_five_terms_sums_more(count, on_device, monkeypatch):
    """The CUDA C++ backend, with the reference in place of its kernel."""
    from fastcache.ops.backends import cuda

    seen = []

    def kernel(out, tensors, weights):
        seen.append(len(tensors))
        reference.linear_combine(out, tensors, weights)

    monkeypatch.setattr(cuda, "_op", lambda name: kernel)
    rows = [torch.full((2, 3), float(i + 1)) for i in range(count)]
    weights = [(-1.0) ** i for i in range(count)]
    wanted = sum(w * (i + 1) for i, w in enumerate(weights))
    cuda.linear_combine(rows[-1], rows, torch.tensor(weights) if on_device else weights)
    assert rows[-1].unique().tolist() == [wanted]
    assert max(seen) <= cuda.TERMS and len(seen) == 1 + max(0, -(-(count - 5) // 4))


def test_reference_reads_the_gram_numbers_in_the_order_of_the_kernel():
    rows = [torch.randn(2, 6, 4, dtype=torch.float64) for _ in range(4)]
    d1, d2, d3 = (a - b for a, b in pairwise(rows))
    wanted = [
        (a * b).sum() for a, b in ((d2, d2), (d2, d3), (d3, d3), (d2, d1), (d3, d1), (d1, d1))
    ]
    torch.testing.assert_close(reference.guided_sums(rows[0], rows[1:])[0], torch.stack(wanted))
