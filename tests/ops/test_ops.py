# SPDX-License-Identifier: Apache-2.0
"""The contract of `fastcache.ops`, on every backend that runs on a CPU."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcache
from fastcache import ops
from fastcache.ops import checks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1,), (0,), (760,), (3, 4), (3, 0), (0, 4), (2, 5, 8), (1, 1, 1), (2, 0, 4), (2, 3, 4, 5)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
METRIC = 2e-6
SENTINEL = 77.0
BACKENDS = [n for n, v in fastcache.backends().items() if v is True and n in ("reference", "cpp")]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with fastcache.backend(request.param):
        yield request.param


def test_the_reference_is_among_them():
    assert "reference" in BACKENDS


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def three(shape, dtype=torch.float32):
    return random(shape, dtype, 1), random(shape, dtype, 2), random(shape, dtype, 3)


def rounded(y: Tensor, x: Tensor) -> Tensor:
    """y - x rounded once to the storage dtype."""
    return (y.double() - x.double()).to(y.dtype)


def close(a: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    assert a.shape == truth.shape and a.dtype == dtype
    bound = TOLERANCE[dtype] * max(truth.abs().max().item() if truth.numel() else 0.0, 1.0)
    return not a.numel() or (a.double() - truth.double()).abs().max().item() <= bound


def inside(t: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A copy of `t` in the middle of a larger buffer, and that buffer."""
    buffer = torch.full((t.numel() + offset + 9,), SENTINEL, dtype=t.dtype)
    view = buffer[offset : offset + t.numel()].view(t.shape)
    view.copy_(t)
    return view, buffer


def tokens(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a [B, T, C] tensor as a token range of a longer one, and the longer one."""
    batch, length, width = t.shape
    whole = torch.full((batch, length + 7, width), SENTINEL, dtype=t.dtype)
    view = whole[:, 3 : 3 + length]
    view.copy_(t)
    return view, whole


# --- signatures ----------------------------------------------------------------------------------

NAMES = {
    "residual_l1": ["y", "x", "prev", "out"],
    "residual_magnitude": ["y", "x", "prev", "out", "eps"],
    "residual_store": ["y", "x", "out"],
    "residual_apply": ["x", "r", "out"],
    "linear_combine": ["tensors", "weights", "out"],
    "taylor_update_": ["factors", "y", "inv_delta", "valid"],
    "guided_weights": ["guide", "guides", "prior", "ridge"],
}


@pytest.mark.parametrize("name", NAMES)
def test_argument_names(name):
    found = inspect.signature(getattr(ops, name)).parameters
    assert [p.name for p in found.values() if p.kind is not p.KEYWORD_ONLY] == NAMES[name]
    for optional in ("out", "eps"):
        if optional in found and name != "residual_store":
            assert found[optional].default == {"out": None, "eps": 1e-8}[optional]


# --- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_l1(shape, dtype):
    y, x, prev = three(shape, dtype)
    r = rounded(y, x)
    truth = torch.stack([(r.double() - prev.double()).abs().sum(), prev.double().abs().sum()])
    sums = ops.residual_l1(y, x, prev)
    assert sums.dtype == torch.float32 and sums.shape == (2,)
    torch.testing.assert_close(sums.double(), truth, rtol=METRIC, atol=0)
    out = torch.full_like(y, math.nan)
    again = ops.residual_l1(y, x, prev, out=out)
    assert torch.equal(again, sums) and torch.equal(out, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1 and math.prod(s)])
def test_residual_magnitude(shape, dtype):
    y, x, prev = three(shape, dtype)
    r = rounded(y, x)
    for eps in (1e-8, 0.5):
        truth = (r.double().norm(dim=-1) / (prev.double().norm(dim=-1) + eps)).mean().reshape(1)
        mean = ops.residual_magnitude(y, x, prev, eps=eps)
        assert mean.dtype == torch.float32 and mean.shape == (1,)
        torch.testing.assert_close(mean.double(), truth, rtol=METRIC, atol=0)
    mean = ops.residual_magnitude(y, x, prev)
    again = ops.residual_magnitude(y, x, prev, out=prev)  # out may be prev
    assert torch.equal(again, mean) and torch.equal(prev, r)


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (2, 0, 4)])
def test_magnitude_of_nothing_is_no_number_or_zero(shape):
    mean = ops.residual_magnitude(*three(shape))
    assert mean.shape == (1,) and (torch.isnan(mean).all() or mean.item() == 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_store_and_apply(shape, dtype):
    y, x, r = three(shape, dtype)
    out = torch.full_like(y, math.nan)
    assert ops.residual_store(y, x, out) is out
    assert torch.equal(out, rounded(y, x))
    expected = (x.double() + r.double()).to(dtype)
    fresh = ops.residual_apply(x, r)
    assert torch.equal(fresh, expected) and fresh is not x
    assert ops.residual_apply(x, r, out=out) is out and torch.equal(out, expected)
    assert ops.residual_apply(x, r, out=x) is x and torch.equal(x, expected)


@pytest.mark.parametrize("device_weights", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (760,), (2, 5, 8), (2, 3, 4, 5)])
def test_linear_combine(shape, dtype, count, device_weights):
    tensors = [random(shape, dtype, i) for i in range(count)]
    weights: Any = [1.0, -0.5, 2, 0.25, -3.0][:count]
    truth = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    if device_weights:
        weights = torch.tensor(weights)
    assert close(ops.linear_combine(tensors, weights), truth, dtype)
    assert close(ops.linear_combine(tuple(tensors), weights), truth, dtype)
    out = torch.full(shape, math.nan, dtype=dtype)
    assert ops.linear_combine(tensors, weights, out=out) is out and close(out, truth, dtype)
    last = tensors[-1]
    assert ops.linear_combine(tensors, weights, out=last) is last and close(last, truth, dtype)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (7,), (1, 9), (2, 5, 8), (3, 3, 4, 5)])
def test_linear_combine_with_weights_of_each_sample(shape, dtype, count):
    tensors = [random(shape, dtype, i) for i in range(count)]
    weights = random((shape[0], count), seed=9)
    columns = [w.double().view(-1, *[1] * (len(shape) - 1)) for w in weights.unbind(1)]
    truth = sum(w * t.double() for w, t in zip(columns, tensors, strict=True))
    assert close(ops.linear_combine(tensors, weights), truth, dtype)
    apart = torch.full((shape[0], 2 * count), math.nan)[:, ::2].copy_(weights)
    out = torch.full(shape, math.nan, dtype=dtype)
    assert ops.linear_combine(tensors, apart, out=out) is out and close(out, truth, dtype)
    for b in range(shape[0]):  # the bits that each sample has alone
        alone = ops.linear_combine([t[b : b + 1] for t in tensors], weights[b].tolist())
        assert torch.equal(out[b : b + 1], alone)
    last = tensors[-1]
    assert ops.linear_combine(tensors, weights, out=last) is last and torch.equal(last, out)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_taylor_update(dtype, order):
    for valid in range(order + 2):
        y, old = (
            random((2, 5, 8), dtype, 9),
            [random((2, 5, 8), dtype, i) for i in range(order + 1)],
        )
        factors = [f.clone() for f in old]
        assert ops.taylor_update_(factors, y, 0.5, valid) is None
        new = y.double()
        for j in range(order + 1):
            if j > min(valid, order):
                assert torch.equal(factors[j], old[j]), "a factor past the valid ones was touched"
                continue
            assert close(factors[j], new, dtype)
            new = (new - old[j].double()) * 0.5
    stacked = torch.stack(old)
    ops.taylor_update_(stacked, y, 0.5, order + 1)
    assert all(torch.equal(a, b) for a, b in zip(stacked, factors, strict=True))


def test_guidance_combine():
    for dtype in DTYPES:
        cond, low, high = random((2, 3, 4), dtype, 1), random((2, 3, 4), seed=2), random((2, 3, 4))
        out = ops.guidance_combine(cond, low, high, 1.1, 0.5)
        truth = cond.double() + 1.1 * low.double() + 0.5 * high.double()
        assert close(out[:2], truth, dtype) and torch.equal(out[2:], cond)
        given = torch.full_like(out, math.nan)
        assert ops.guidance_combine(cond, low, high, 1.1, 0.5, out=given) is given
        assert torch.equal(given, out)


# --- layouts -----------------------------------------------------------------------------------------


CALLS = {
    "residual_l1": lambda y, x, z, out: ops.residual_l1(y, x, z, out=out),
    "residual_magnitude": lambda y, x, z, out: ops.residual_magnitude(y, x, z, out=out),
    "residual_store": lambda y, x, z, out: ops.residual_store(y, x, out),
    "residual_apply": lambda y, x, z, out: ops.residual_apply(y, x, out=out),
    "linear_combine": lambda y, x, z, out: ops.linear_combine([y, x, z], [1.0, 2.0, 3.0], out=out),
    "taylor_update_": lambda y, x, z, out: ops.taylor_update_([out, z], y, 1.0, 0),
    "guided_weights": lambda y, x, z, out: ops.guided_weights(y, [x, z], torch.ones(1)),
}
METRICS = ("residual_l1", "residual_magnitude", "guided_weights")


@pytest.mark.parametrize("place", [1, 2, 3, 5, 8, "tokens"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_any_offset_and_token_ranges_between_sentinels(name, dtype, place):
    """A view gives the bits of a copy, and nothing beside it is written."""
    given = [*three((2, 21, 8), dtype), torch.full((2, 21, 8), math.nan, dtype=dtype)]
    expected = [t.clone() for t in given]
    result = CALLS[name](*expected)
    views = [tokens(t) if place == "tokens" else inside(t, place) for t in given]
    again = CALLS[name](*(v for v, _ in views))
    for (view, whole), value in zip(views, expected, strict=True):
        assert torch.equal(torch.nan_to_num(view), torch.nan_to_num(value))
        count = (whole == SENTINEL).sum().item()
        assert count == whole.numel() - view.numel(), "something beside the view was written"
    if name in METRICS:
        torch.testing.assert_close(again, result, rtol=METRIC, atol=0)
    elif result is not None:
        assert again is views[3][0]


@pytest.mark.parametrize("name", CALLS)
def test_strides_of_every_kind_are_right_or_refused(name):
    """Transposed inputs and outputs: a kernel that cannot take them must not pretend."""
    given = [*three((6, 4, 8)), torch.zeros(6, 4, 8)]
    expected = [t.clone() for t in given]
    result = CALLS[name](*expected)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in given]
    assert not turned[0].is_contiguous()
    again = CALLS[name](*turned)
    if name in METRICS:
        torch.testing.assert_close(again, result, rtol=METRIC, atol=0)
    for a, b in zip(turned, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# --- outputs that share memory ---------------------------------------------------------------------------


IN_PLACE: dict[
    str, Any
] = {  # calls whose output is `out`, and the inputs that are read from the start of `a`
    "residual_l1: prev": lambda a, b, out: ops.residual_l1(b, b, a, out=out),
    "residual_magnitude: prev": lambda a, b, out: ops.residual_magnitude(b, b, a, out=out),
    "residual_store: y": lambda a, b, out: ops.residual_store(a, b, out),
    "residual_store: x": lambda a, b, out: ops.residual_store(b, a, out),
    "residual_apply: r": lambda a, b, out: ops.residual_apply(b, a, out),
    "linear_combine: tensors[1]": lambda a, b, out: ops.linear_combine([b, a], [1.0, 2.0], out),
    "taylor_update_: y": lambda a, b, out: ops.taylor_update_([b, out], a, 1.0, 1),
    "taylor_update_: factors[0]": lambda a, b, out: ops.taylor_update_([a, out], b, 1.0, 1),
    "guidance_combine: cond": lambda a, b, out: ops.guidance_combine(
        a[:1], b[:1], b[:1], 1.0, 1.0, out
    ),
    "quantize_store: y": lambda a, b, out: ops.quantize_store(
        a, None, (out.view(torch.float8_e4m3fn)[..., :8], torch.empty(2, 9))
    ),
    "quantized_combine: base": lambda a, b, out: ops.quantized_combine(
        a, [torch.zeros(2, 9, 8).to(torch.float8_e4m3fn)], [torch.ones(2, 9)], [1.0], out
    ),
}


@pytest.mark.parametrize("call", IN_PLACE)
def test_an_output_may_not_overlap_an_input_in_part(call):
    name = call.split(": ")[1]
    for shift in (1, 8):
        memory = torch.zeros(400)
        a = memory[100:244].view(2, 9, 8)
        out = memory[100 + shift : 244 + shift].view(2, 9, 8)
        with pytest.raises(ValueError, match=rf"out.*overlaps {re.escape(name)}"):
            IN_PLACE[call](a, torch.zeros(2, 9, 8), out)


@pytest.mark.parametrize("call", [c for c in IN_PLACE if not c.startswith(("guid", "quantize_"))])
def test_an_output_may_be_an_input_or_lie_between_its_rows(call):
    b = random((2, 9, 8), seed=1)
    alone, same = random((2, 9, 8)), random((2, 9, 8))
    out = torch.zeros(2, 9, 8)
    if "taylor" not in call:  # there `out` is read too
        IN_PLACE[call](alone, b, out)
        IN_PLACE[call](same, b, same)
        assert torch.equal(same, out)
    both = torch.cat([random((2, 9, 8)), torch.zeros(2, 9, 8)], dim=1)
    fresh = torch.zeros(2, 9, 8)
    IN_PLACE[call](both[:, :9].clone(), b.clone(), fresh)
    IN_PLACE[call](both[:, :9], b.clone(), both[:, 9:])  # token ranges of one buffer
    assert torch.equal(both[:, 9:], fresh)


def test_overlap_is_exact_for_views_of_equal_strides():
    memory, g = torch.zeros(300), torch.Generator().manual_seed(0)
    pick = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    found = 0
    for _ in range(2000):
        shape = [pick(1, 5) for _ in range(pick(1, 4))]
        strides, step = [0] * len(shape), pick(1, 4)
        for d in torch.randperm(len(shape), generator=g).tolist():
            strides[d], step = step, step * shape[d] + pick(0, 4)
        places = []
        views = [memory.as_strided(shape, strides, pick(0, 30)) for _ in range(2)]
        for view in views:
            memory.zero_()
            view.fill_(1.0)
            places.append(memory.clone())
        shared = views[0].data_ptr() != views[1].data_ptr() and bool((places[0] * places[1]).any())
        assert checks.overlap(*views) == shared
        found += shared
    assert 200 < found < 1800


# --- NaN and infinity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_propagate(which, dtype, value):
    given = list(three((2, 33, 8), dtype))
    given[which].view(-1)[200] = value
    sums = ops.residual_l1(*given)
    assert not torch.isfinite(sums[0])
    assert torch.isfinite(sums[1]) == (which != 2)
    mean = ops.residual_magnitude(*given)
    assert not torch.isfinite(mean) or (which == 2 and math.isinf(value))
    y, x, _ = given
    if which < 2:
        out = torch.zeros_like(y)
        assert not torch.isfinite(ops.residual_store(y, x, out).view(-1)[200])
        assert not torch.isfinite(ops.residual_apply(y, x).view(-1)[200])
        assert not torch.isfinite(ops.linear_combine([y, x], [1.0, 1.0]).view(-1)[200])
        assert torch.isfinite(ops.linear_combine([y, x], [1.0, 1.0])).sum() == y.numel() - 1


def test_a_zero_reference_gives_zero_as_the_second_sum():
    y, x, _ = three((4, 8))
    sums = ops.residual_l1(y, x, torch.zeros_like(y))
    assert sums[1] == 0 and sums[0] > 0
    assert (ops.residual_l1(y, y, torch.zeros_like(y)) == 0).all()


# --- the same bits every time ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1000, 64), (1, 77, 5)])
def test_reductions_are_bit_identical_between_runs_and_thread_counts(shape, dtype, backend):
    given = three(shape, dtype)

    def guided(y: Tensor, *others: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in ops.guided_weights(y, others, torch.ones(1))])

    for op in (ops.residual_l1, ops.residual_magnitude, guided):
        first = op(*given)
        counts = (1, 2, 3, 4) if backend == "cpp" else (1, 1)
        for threads in counts:
            torch.set_num_threads(threads)
            copies = [t.clone() for t in given]
            assert torch.equal(op(*copies), first), f"{threads} threads"


# --- errors -------------------------------------------------------------------------------------------------


T = random((2, 3, 4))
ARGUMENTS = {
    "residual_l1": {"y": T, "x": T, "prev": T, "out": T.clone()},
    "residual_magnitude": {"y": T, "x": T, "prev": T, "out": T.clone()},
    "residual_store": {"y": T, "x": T, "out": T.clone()},
    "residual_apply": {"x": T, "r": T, "out": T.clone()},
    "linear_combine": {"tensors": [T, T], "weights": [1.0, 2.0], "out": T.clone()},
    "taylor_update_": {"factors": [T.clone(), T.clone()], "y": T, "inv_delta": 1.0, "valid": 1},
    "guidance_combine": {"cond": T, "low": T, "high": T, "w_low": 1.0, "w_high": 1.0},
    "guided_weights": {"guide": T, "guides": [T, T * 2], "prior": torch.ones(1)},
}
BAD_TENSORS = {
    "float64": T.double(),
    "integers": T.int(),
    "complex": T.to(torch.complex64),
    "another dtype": T.half(),
    "another shape": T[:, :2],
    "another device": T.to("meta"),
    "None": None,
    "a list": T.tolist(),
    "a number": 1.0,
    "sparse": T.to_sparse(),
}


def cases():
    for name, arguments in ARGUMENTS.items():
        for key, value in arguments.items():
            if isinstance(value, Tensor) or isinstance(value, list):
                for what, bad in BAD_TENSORS.items():
                    if key == "out" and bad is None and name != "residual_store":
                        continue  # None is its default
                    if key == "weights":
                        continue
                    if name == "guidance_combine" and (key, what) == ("cond", "another dtype"):
                        continue  # the parts are float32 whatever the model's dtype is
                    yield pytest.param(name, key, bad, id=f"{name}-{key}-{what}")


@pytest.mark.parametrize("name, key, bad", list(cases()))
def test_a_bad_tensor_is_refused_and_named(name, key, bad):
    arguments = dict(ARGUMENTS[name])
    if isinstance(arguments[key], list):
        bad = [arguments[key][0], bad]
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(ops, name)(**{**arguments, key: bad})
    message = str(caught.value)
    assert name in message
    # where two disagree either may be named; that one of them is wrong by itself names it
    shared = {k for k, v in arguments.items() if isinstance(v, Tensor | list)}
    assert any(k in message for k in shared)
    if bad is None or not isinstance(bad, Tensor | list):
        assert key in message


BAD_VALUES = [
    ("linear_combine", "tensors", []),
    ("linear_combine", "tensors", [T] * 6),
    ("linear_combine", "tensors", T),
    ("linear_combine", "tensors", None),
    ("linear_combine", "weights", [1.0]),
    ("linear_combine", "weights", [1.0, 2.0, 3.0]),
    ("linear_combine", "weights", None),
    ("linear_combine", "weights", "ab"),
    ("linear_combine", "weights", [1.0, "2"]),
    ("linear_combine", "weights", [1.0, None]),
    ("linear_combine", "weights", 3.0),
    ("linear_combine", "weights", torch.ones(3)),
    ("linear_combine", "weights", torch.ones(2, 1)),
    ("linear_combine", "weights", torch.ones(3, 2)),
    ("linear_combine", "weights", torch.ones(2, 2, 1)),
    ("linear_combine", "weights", torch.ones(2, 2).half()),
    ("linear_combine", "weights", torch.ones(2).double()),
    ("linear_combine", "weights", torch.ones(2).to("meta")),
    ("taylor_update_", "factors", []),
    ("taylor_update_", "factors", None),
    ("taylor_update_", "factors", "ab"),
    ("taylor_update_", "factors", torch.tensor(1.0)),
    ("taylor_update_", "inv_delta", None),
    ("taylor_update_", "inv_delta", "1"),
    ("taylor_update_", "valid", -1),
    ("taylor_update_", "valid", 3),
    ("taylor_update_", "valid", 1.5),
    ("taylor_update_", "valid", None),
    ("taylor_update_", "valid", True),
    ("residual_magnitude", "eps", "small"),
    ("residual_magnitude", "eps", -1.0),
    ("residual_magnitude", "eps", math.nan),
    ("residual_magnitude", "y", random((5,))),
    ("residual_l1", "out", T[:1].expand(2, 3, 4)),
    ("residual_apply", "out", T[:1].expand(2, 3, 4)),
    ("guidance_combine", "out", T),
    ("guidance_combine", "out", torch.zeros(4, 3, 4).half()),
    ("guided_weights", "guides", []),
    ("guided_weights", "guides", [T]),
    ("guided_weights", "guides", [T] * 5),
    ("guided_weights", "guides", T),
    ("guided_weights", "guides", None),
    ("guided_weights", "prior", torch.ones(2)),
    ("guided_weights", "prior", torch.ones(1).half()),
    ("guided_weights", "prior", torch.ones(1).to("meta")),
    ("guided_weights", "prior", [1.0]),
    ("guided_weights", "ridge", -1.0),
    ("guided_weights", "ridge", math.nan),
    ("guided_weights", "ridge", "small"),
]


@pytest.mark.parametrize("name, key, bad", BAD_VALUES)
def test_a_bad_value_is_refused_and_named(name, key, bad):
    arguments = {**ARGUMENTS[name], key: bad}
    if key == "y" and name == "residual_magnitude":
        arguments = {"y": bad, "x": bad, "prev": bad}
    with pytest.raises((TypeError, ValueError), match=key):
        getattr(ops, name)(**arguments)


@pytest.mark.parametrize(
    "name, key",
    [(n, k) for n, a in ARGUMENTS.items() for k, v in a.items() if isinstance(v, Tensor | list)],
)
def test_inputs_that_require_grad_are_refused_while_grad_mode_is_on(name, key):
    if key == "weights":
        bad: Any = torch.ones(2, requires_grad=True)
    elif isinstance(ARGUMENTS[name][key], list):
        bad = [T.clone(), T.clone().requires_grad_()]
    else:
        bad = ARGUMENTS[name][key].clone().requires_grad_()
    arguments = {**ARGUMENTS[name], key: bad}
    with pytest.raises(ValueError, match=key):
        getattr(ops, name)(**arguments)
    with torch.no_grad():
        getattr(ops, name)(**arguments)
    with torch.inference_mode():
        getattr(ops, name)(**arguments)


# --- registration --------------------------------------------------------------------------------------------


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.split("::")[1].split(".")[0] for n in names if n.startswith("fastcache::")}


def samples() -> dict[str, list[tuple]]:
    y, x, prev = three((2, 5, 8))
    low = random((2, 5, 8), seed=7)
    return {
        "residual_l1": [(y, x, prev), (y, x, prev, True), (y[:0], x[:0], prev[:0])],
        "residual_l1_": [(torch.zeros_like(y), y, x, prev)],
        "residual_l1_into_": [
            (torch.zeros(2), y, x, prev),
            (torch.zeros(2, 2), y, x, prev, True),
        ],
        "modulated_l1": [(y, x[:, :1], low[:, :1], prev, 1e-6)],
        "modulated_l1_": [(torch.zeros_like(y), y, x[:, :1], low[:, :1], prev, 1e-6)],
        "residual_magnitude": [(y, x, prev), (y, x, prev, 1e-3, True)],
        "residual_magnitude_": [(torch.zeros_like(y), y, x, prev)],
        "residual_store_": [(torch.zeros_like(y), y, x)],
        "residual_apply_": [(torch.zeros_like(y), y, x)],
        "linear_combine_": [(torch.zeros_like(y), [y, x], [1.0, 2.0]), (y.clone(), [y], [2.0])],
        "linear_combine_device_": [(torch.zeros_like(y), [y, x], torch.tensor([1.0, 2.0]))],
        "linear_combine_samples_": [
            (torch.zeros_like(y), [y, x], random((2, 2), seed=8)),
            (torch.zeros(2, 4, 8), [y[:, 1:], x[:, 1:], prev[:, :4]], random((2, 3), seed=8)),
        ],
        "taylor_update_": [([torch.zeros_like(y), torch.zeros_like(y)], y, 0.5, 1)],
        "guidance_combine_": [(torch.zeros(4, 5, 8), y, x, low, 1.1, 0.9)],
        "guided_weights": [
            (y, [x, prev], torch.tensor([2.0]), 1e-3),
            (y[:, ::2], [x[:, ::2], prev[:, 2:], low[:, ::2]], torch.ones(2), 0.0, True),
        ],
    }


def test_every_registered_op_has_a_sample():
    assert {n for n in registered() if not n.startswith("_")} == set(samples())


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name):
    op = getattr(torch.ops.fastcache, name).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks.append("test_aot_dispatch_dynamic")
    for sample in samples()[name]:
        result = torch.library.opcheck(op, sample, test_utils=checks)
        assert list(result.values()) == ["SUCCESS"] * len(checks)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_sums_go_where_they_are_wanted(per_sample):
    for tokens in (5, 0):
        given = [t[:, :tokens] for t in three((2, 5, 8))]
        want = torch.ops.fastcache.residual_l1.default(*given, per_sample)
        got = torch.full_like(want, 7.0)
        torch.ops.fastcache.residual_l1_into_.default(got, *given, per_sample)
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "name",
    ["residual_l1", "residual_apply", "linear_combine", "residual_store", "guided_weights"],
)
def test_wrappers_trace_whole(name):
    """`fullgraph`: no graph break inside a public op."""
    arguments = {k: v for k, v in ARGUMENTS[name].items() if k != "out" or name == "residual_store"}
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), backend="eager", fullgraph=True)
    a, b = compiled(**arguments), getattr(ops, name)(**arguments)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
