# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels against `reference.py` and against float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastcache.ops import reference
from fastcache.ops.backends import cpp

pytestmark = pytest.mark.skipif(cpp.available() is not True, reason=str(cpp.available()))

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
SENTINEL = 12345.0
RELATIVE = 2e-6  # the bound on a metric, whatever the dtype


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, and NaN where the other one has NaN."""
    return torch.equal(torch.nan_to_num(a.float(), nan=7e7), torch.nan_to_num(b.float(), nan=7e7))


def l1_truth(y, x, prev):
    r = (y.float() - x.float()).to(prev.dtype).double()
    return torch.stack([(r - prev.double()).abs().sum(), prev.double().abs().sum()])


def magnitude_truth(y, x, prev, eps=1e-8):
    r = (y.float() - x.float()).to(prev.dtype).double()
    return (r.norm(dim=-1) / (prev.double().norm(dim=-1) + eps)).mean()


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def three(shape, value, stored):
    return random(shape, value, 1), random(shape, value, 2), random(shape, stored, 3)


# --- metrics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value, stored", PAIRS)
@pytest.mark.parametrize(
    "shape", [(1,), (760,), (4095,), (3, 129, 257), (2, 700, 96), (2, 3, 5, 7)]
)
def test_metrics_are_within_2e6_of_float64(shape, value, stored):
    y, x, prev = three(shape, value, stored)
    sums = cpp.residual_l1(y, x, prev)
    torch.testing.assert_close(sums.double(), l1_truth(y, x, prev), rtol=RELATIVE, atol=0)
    mean = cpp.residual_magnitude(y, x, prev)
    truth = magnitude_truth(y, x, prev).reshape(1)
    torch.testing.assert_close(mean.double(), truth, rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 0.7, 1.0000001, 1.9999999])
def test_equal_elements_whose_rounding_errors_all_point_the_same_way(constant):
    prev = torch.full((1_000_003,), constant)
    y, x = torch.zeros_like(prev), torch.zeros_like(prev)
    sums = cpp.residual_l1(y, x, prev)
    torch.testing.assert_close(sums.double(), l1_truth(y, x, prev), rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("value, stored", PAIRS)
def test_per_sample_metrics_are_those_of_each_sample(value, stored):
    y, x, prev = three((5, 33, 70), value, stored)
    sums = cpp.residual_l1(y, x, prev, per_sample=True)
    means = cpp.residual_magnitude(y, x, prev, per_sample=True)
    assert sums.shape == (5, 2) and means.shape == (5, 1)
    for b in range(5):
        alone = cpp.residual_l1(y[b : b + 1], x[b : b + 1], prev[b : b + 1])
        assert torch.equal(sums[b], alone)
        truth = magnitude_truth(y[b], x[b], prev[b]).reshape(1)
        torch.testing.assert_close(means[b].double(), truth, rtol=RELATIVE, atol=0)


def test_results_do_not_depend_on_the_number_of_threads():
    y, x, prev = three((3, 400, 333), F32, F32)
    wide = three((3, 400, 333), BF16, BF16)

    def guided(y, x, prev, per_sample):
        return cpp.guided_sums(y, [x, prev], per_sample)

    def results():
        return [
            f(*operands, per_sample=per_sample)
            for f in (cpp.residual_l1, cpp.residual_magnitude, guided)
            for operands in ((y, x, prev), wide)
            for per_sample in (False, True)
        ]

    first = results()
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert all(map(torch.equal, first, results()))


def test_squares_that_overflow_or_vanish_in_float32_still_count():
    for scale in (1e30, 1e-30):
        y, x, prev = (t * scale for t in three((4, 64), F32, F32))
        mean = cpp.residual_magnitude(y, x, prev, eps=0.0)
        truth = magnitude_truth(y, x, prev, eps=0.0).reshape(1)
        torch.testing.assert_close(mean.double(), truth, rtol=RELATIVE, atol=0)


def test_a_sum_overflows_only_where_float32_must():
    prev = torch.full((4096,), 8e34)
    zero = torch.zeros_like(prev)
    assert torch.isfinite(cpp.residual_l1(zero, zero, prev)).all()  # 3.28e38 fits
    assert torch.isinf(cpp.residual_l1(zero, zero, prev * 2)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 20, 40])  # 40: in the padded tail
def test_nan_and_infinity_reach_the_sums_and_the_residual(bad, position):
    y, x, prev = three((41,), F32, F32)
    y[position] = bad
    out = torch.empty_like(prev)
    sums = cpp.residual_l1(y, x, prev, out)
    assert identical(sums, reference.residual_l1(y, x, prev))
    assert identical(out, y - x)
    assert not torch.isfinite(cpp.residual_magnitude(y, x, prev)).any()


def test_zero_denominator_is_left_to_the_caller():
    y, x, _ = three((64,), F32, F32)
    assert cpp.residual_l1(y, x, torch.zeros(64))[1] == 0
    assert torch.isinf(cpp.residual_magnitude(y, x, torch.zeros(64), eps=0.0))


# --- element by element -----------------------------------------------------------------------


@st.composite
def layouts(draw):
    """A shape and a function that makes a tensor of it: contiguous or a token range, any offset."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    if draw(st.booleans()):
        shape = (draw(st.integers(1, 3)), draw(st.integers(0, 40)), draw(st.integers(1, 70)))
    value, stored = draw(st.sampled_from(PAIRS))

    def make(dtype, seed, rows_apart=False):
        """The view, and a check that nothing around it was written."""
        offset, gap, every = draw(st.integers(0, 33)), 0, 1
        if len(shape) == 3 and draw(st.booleans()):
            gap = draw(st.integers(0, 3)) * shape[2]  # tokens of the sample outside the range
            every = draw(st.integers(1, 4)) if rows_apart else 1
        length = math.prod(shape[1:]) * every + gap
        storage = torch.full((offset + shape[0] * length + 17,), SENTINEL).to(dtype)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        strides[1:-1] = [stride * every for stride in strides[1:-1]]
        view = storage.as_strided(shape, [length, *strides[1:]], offset)
        view.copy_(random(shape, dtype, seed))
        inside = torch.zeros_like(storage, dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), offset).fill_(True)
        before = storage[~inside].clone()
        return view, lambda: torch.equal(storage[~inside], before)

    return value, stored, make


@given(layouts(), st.booleans())
def test_residuals_are_stored_with_the_bits_of_the_reference(layout, in_place):
    value, stored, make = layout
    (y, _), (x, _), (prev, clean_prev), (out, clean) = (
        make(dtype, i) for i, dtype in enumerate((value, value, stored, stored))
    )
    expected = torch.full_like(out, math.nan)
    sums = reference.residual_l1(y, x, prev, expected)
    out.fill_(math.nan)
    got = cpp.residual_l1(y, x, prev, out)
    torch.testing.assert_close(got, sums, rtol=RELATIVE, atol=0)
    assert identical(out, expected) and clean()

    mean = reference.residual_magnitude(y, x, prev)
    out = prev if in_place else out.fill_(math.nan)
    got = cpp.residual_magnitude(y, x, prev, out)
    torch.testing.assert_close(got, mean, rtol=RELATIVE, atol=0, equal_nan=True)
    assert identical(out, expected) and clean() and clean_prev()

    out.fill_(math.nan)
    cpp.residual_store(out, y, x)
    assert identical(out, expected) and clean()


@given(layouts(), st.booleans())
def test_apply_has_the_bits_of_the_reference(layout, in_place):
    value, stored, make = layout
    (x, clean_x), (r, _), (out, clean) = (
        make(dtype, i) for i, dtype in enumerate((value, stored, value))
    )
    expected = torch.empty_like(x)
    reference.residual_apply(expected, x, r)
    out = x if in_place else out.fill_(math.nan)
    cpp.residual_apply(out, x, r)
    assert identical(out, expected) and clean() and clean_x()


@given(layouts(), st.integers(1, 8), st.integers(-1, 7), st.booleans(), st.data())
def test_weighted_sums_have_the_bits_of_the_reference(layout, count, alias, on_device, data):
    value, stored, make = layout
    terms, checks = zip(*(make((value, stored)[i % 2], i) for i in range(count)), strict=True)
    weights = data.draw(st.lists(st.floats(-4, 4, width=32), min_size=count, max_size=count))
    out, clean = make(value, 99)
    out = terms[alias] if 0 <= alias < count else out.fill_(math.nan)
    expected = torch.empty_like(out)
    reference.linear_combine(expected, terms, weights)
    cpp.linear_combine(out, terms, torch.tensor(weights) if on_device else weights)
    assert identical(out, expected) and clean() and all(check() for check in checks)


@given(layouts(), st.integers(1, 8), st.integers(-1, 7), st.integers(0, 99))
def test_weighted_sums_of_each_sample_have_the_bits_of_the_reference(layout, count, alias, seed):
    value, stored, make = layout
    terms, checks = zip(*(make((value, stored)[i % 2], i) for i in range(count)), strict=True)
    out, clean = make(value, 99)
    out = terms[alias] if 0 <= alias < count else out.fill_(math.nan)
    weights, expected = random((out.shape[0], count), F32, seed), torch.empty_like(out)
    reference.combine_samples(expected, terms, weights)
    cpp.combine_samples(out, terms, weights)
    assert identical(out, expected) and clean() and all(check() for check in checks)


@given(layouts(), st.integers(0, 4), st.integers(0, 6), st.sampled_from([1.0, 1 / 3, 0.0, -0.2]))
@example(
    (F32, BF16, lambda dtype, seed: (random((2, 30, 50), dtype, seed), lambda: True)), 4, 5, 0.5
)
def test_differences_have_the_bits_of_the_reference(layout, order, valid, inv_delta):
    value, stored, make = layout
    y, _ = make(value, 99)
    factors, checks = zip(*(make(stored, i) for i in range(order + 1)), strict=True)
    expected = [f.clone() for f in factors]
    reference.taylor_update(expected, y, inv_delta, valid)
    cpp.taylor_update(factors, y, inv_delta, valid)
    assert all(map(identical, factors, expected)) and all(check() for check in checks)


@given(layouts())
def test_guidance_has_the_bits_of_the_reference(layout):
    value, stored, make = layout
    (cond, _), (low, _), (high, _) = (make(dtype, i) for i, dtype in enumerate((value, F32, F32)))
    shape = (2 * cond.shape[0], *cond.shape[1:])
    out, expected = (torch.full(shape, math.nan, dtype=stored) for _ in range(2))
    reference.guidance_combine(expected, cond, low, high, 1.1, 0.7)
    cpp.guidance_combine(out, cond, low, high, 1.1, 0.7)
    assert identical(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0, 1e-8, 65519.0, 65520.0, 3.39e38])
def test_special_values_round_as_torch_rounds_them(dtype, value):
    x, r = torch.full((37,), value), torch.zeros(37)
    for source in (F32, dtype):
        out = torch.empty(37, dtype=dtype)
        cpp.residual_apply(out, x.to(source), r)
        assert identical(out, (x.to(source).float() + 0.0).to(dtype))


def test_offsets_beyond_two_to_the_31():
    """Two samples 2^31 + 5 elements apart; the memory between them is never touched."""
    stride = 2**31 + 5
    storage = torch.empty(stride + 600, dtype=BF16)
    view = storage.as_strided((2, 3, 100), (stride, 100, 1), 7)
    x, r = random((2, 3, 100), BF16, 1), random((2, 3, 100), BF16, 2)
    cpp.residual_apply(view, x, r)
    assert torch.equal(view, x + r)
    assert torch.equal(cpp.residual_l1(x, r, view), cpp.residual_l1(x, r, view.clone()))


# --- guided prediction ------------------------------------------------------------------------


@given(layouts(), st.integers(1, 3), st.booleans())
@example((F32, BF16, lambda dtype, seed, _: (random((3, 90, 257), dtype, seed), None)), 2, True)
@example((F32, BF16, lambda dtype, seed, _: (random((3, 90, 257), dtype, seed), None)), 3, True)
def test_guided_sums_are_those_of_the_reference_whatever_the_layout(layout, order, per_sample):
    value, stored, make = layout
    kinds = [value] + [stored] * (order + 1)
    guide, *guides = (make(dtype, i, True)[0] for i, dtype in enumerate(kinds))
    sums = cpp.guided_sums(guide, guides, per_sample)
    expected = reference.guided_sums(guide, guides, per_sample)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12 * largest)
    copies = [t.contiguous() for t in guides]
    assert torch.equal(cpp.guided_sums(guide.contiguous(), copies, per_sample), sums)


@given(layouts(), st.integers(1, 3))
def test_guided_sums_per_sample_are_those_of_each_sample(layout, order):
    value, _, make = layout
    tensors = [make(value, i)[0] for i in range(order + 2)]
    if tensors[0].dim() != 3 or not tensors[0].numel():
        return
    sums = cpp.guided_sums(tensors[0], tensors[1:], True)
    for b in range(len(sums)):
        guide, *guides = (t[b : b + 1] for t in tensors)
        assert torch.equal(cpp.guided_sums(guide, guides)[0], sums[b])


def terms(order: int) -> int:
    """How many sums guides of an order give."""
    return order * (order + 3) // 2 + 1


SUMS = st.floats() | st.sampled_from([0.0, -0.0, 1.0, 4.0, math.inf, math.nan, 1e-320, 1e300])


@given(
    st.integers(1, 3).flatmap(
        lambda order: st.tuples(
            st.lists(st.lists(SUMS, min_size=terms(order), max_size=terms(order)), max_size=4),
            st.lists(st.floats(width=32), min_size=order, max_size=order),
        )
    ),
    st.sampled_from([0.0, 0.003, 1.0, 1e30]),
    st.sampled_from([torch.float64, F32]),
    st.booleans(),
)
@example(([[2.0, 6.0, 18.0], [0.0, 0.0, 3.0], [0.0] * 3], [1.5]), 0.0, torch.float64, True)
@example(([[1.0, 2.0, 4.0, 1.0, 2.0, 3.0]], [1.5, 0.0]), 0.0, torch.float64, True)  # parallel
@example(([[3.0, 1.0, 2.0, 1.0, 2.0, 3.0]], [1.5, 0.0]), 0.003, torch.float64, False)
@example(([[3.0, 1.0, math.inf, 1.0, 2.0, 3.0]], [1.5, 0.0]), 0.003, torch.float64, True)
@example(([[3.0, 1.0, 2.0, 1.0, 2.0, math.nan]], [1.5, 0.0]), 0.003, torch.float64, True)
@example(
    ([[3.0, 1.0, 0.5, 2.0, -1.0, 5.0, 1.0, 2.0, 3.0, 9.0]], [1.5, 0.0, 0.25]),
    0.04,
    torch.float64,
    True,
)
@example(  # the third follows from the first two
    ([[1.0, 0.0, 1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 3.0, 9.0]], [1.5, 0.0, 0.25]),
    0.0,
    torch.float64,
    False,
)
def test_guided_solve_has_the_bits_of_the_reference(given_sums, ridge, dtype, base):
    rows, prior = given_sums
    sums = torch.tensor(rows, dtype=dtype).reshape(-1, terms(len(prior)))
    weights, misfit = cpp.guided_solve(sums, torch.tensor(prior), ridge, base)
    expected, expected_misfit = reference.guided_solve(sums, torch.tensor(prior), ridge, base)
    assert weights.shape == expected.shape and identical(weights, expected)
    assert misfit.shape == expected_misfit.shape and identical(misfit, expected_misfit)


@given(
    st.integers(2, 3).flatmap(
        lambda order: st.tuples(
            st.lists(SUMS, min_size=terms(order), max_size=terms(order)),
            st.lists(
                st.lists(SUMS, min_size=terms(order - 1), max_size=terms(order - 1)),
                min_size=1,
                max_size=3,
            ),
            st.lists(st.floats(width=32), min_size=2 * order - 1, max_size=2 * order - 1),
        )
    ),
    st.sampled_from([0.0, 0.003, 1.0, 1e30]),
)
@example(([3.0, 1.0, 2.0, 1.0, 2.0, 3.0], [[2.0, 1.0, 3.0]], [1.5, 0.0, 1.0]), 0.04)
@example(
    (
        [3.0, 1.0, 0.5, 2.0, -1.0, 5.0, 1.0, 2.0, 3.0, 9.0],
        [[3.0, 1.0, 2.0, 0.5, 1.0, 4.0], [5.0, -1.0, 2.0, 1.5, 0.25, 3.0]],
        [1.5, 0.0, 0.25, 1.0, -0.5],
    ),
    0.04,
)
def test_guided_check_has_the_bits_of_the_reference(drawn, ridge):
    sums, values, numbers = drawn
    order = (len(numbers) + 1) // 2
    prior, before = torch.tensor(numbers[:order]), torch.tensor(numbers[order:])
    args = [torch.tensor([row], dtype=torch.float64) for row in (sums, *values)]
    for found, expected in zip(
        cpp.guided_check(args[0], args[1:], prior, before, ridge),
        reference.guided_check(args[0], args[1:], prior, before, ridge),
        strict=True,
    ):
        assert found.shape == expected.shape and identical(found, expected)


# --- what is refused --------------------------------------------------------------------------


def test_the_dtype_table_says_what_the_kernels_take():
    y, x, prev, out = (random((2, 8), F32, i) for i in range(4))
    for dtypes in itertools.product((*DTYPES, torch.float64), repeat=4):
        operands = [t.to(d) for t, d in zip((y, x, prev, out), dtypes, strict=True)]
        calls = {
            "residual_l1": lambda t: cpp.residual_l1(*t),
            "residual_magnitude": lambda t: cpp.residual_magnitude(*t),
            "linear_combine": lambda t: cpp.linear_combine(t[3], t[:3], [1.0, 2.0, 3.0]),
            "combine_samples": lambda t: cpp.combine_samples(t[3], t[:3], torch.ones(2, 3)),
            "taylor_update": lambda t: cpp.taylor_update(t[1:], t[0], 1.0, 3),
            "guided_sums": lambda t: cpp.guided_sums(t[0], t[1:]),
        }
        for op, call in calls.items():
            if cpp.takes_dtypes(op, dtypes):
                call(operands)
            else:
                with pytest.raises(RuntimeError, match=r"dtype|float32"):
                    call(operands)


def test_a_layout_or_shape_that_no_kernel_takes_is_named():
    x = torch.randn(4, 6, 8)
    with pytest.raises(RuntimeError, match="prev must be dense"):
        cpp.residual_l1(x, x, x.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(RuntimeError, match="r has another shape"):
        cpp.residual_apply(x, x, x[:, :3])
    with pytest.raises(RuntimeError, match="1 to 8"):
        cpp.linear_combine(x, [x] * 9, [1.0] * 9)
    with pytest.raises(RuntimeError, match="2 tensors, 1 weights"):
        cpp.linear_combine(x, [x, x], [1.0])
    with pytest.raises(RuntimeError, match="weights must be contiguous float32 with 8"):
        cpp.combine_samples(x, [x, x], torch.ones(2))
    with pytest.raises(RuntimeError, match="guides has another shape"):
        cpp.guided_sums(x, [x, x[:, :3]])
    with pytest.raises(RuntimeError, match="guide must have dense rows"):
        cpp.guided_sums(x[..., ::2], [x[..., :4]] * 2)
    with pytest.raises(RuntimeError, match="order 1 to 3, got 4"):
        cpp.guided_sums(x, [x] * 5)
    with pytest.raises(RuntimeError, match="sums must be contiguous float64 with 3"):
        cpp.guided_solve(torch.zeros(1, 6), torch.zeros(1), 0.0)
    with pytest.raises(RuntimeError, match="order 2 to 3, got 1"):
        cpp.guided_check(torch.zeros(1, 3), [], torch.zeros(1), torch.zeros(0), 0.0)
    with pytest.raises(RuntimeError, match="sums must be contiguous float64 with 6"):
        cpp.exponential_solve([torch.zeros(1, 6)], torch.ones(1), 0.0)
