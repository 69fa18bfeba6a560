# SPDX-License-Identifier: Apache-2.0
"""ops.modulated_l1 against its definition in float64, on whatever backend the device calls for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcache
from fastcache import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((2, 7, 16), (1, 33, 48), (3, 1, 5), (2, 0, 8))


def given(shape: tuple[int, ...], rows: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g).to(dtype)  # noqa: E731
    b, _, c = shape
    size = {"[B, C]": (b, c), "[1, C]": (1, c), "[B, 1, C]": (b, 1, c), "[B, T, C]": shape}[rows]
    return 2 * draw(*shape) + 1, draw(*size), draw(*size), draw(*shape)


def truth(x: Tensor, scale: Tensor, shift: Tensor, prev: Tensor, eps: float = 1e-6):
    x, scale, shift = x.double(), scale.double(), shift.double()
    if scale.dim() == 2:
        scale, shift = scale[:, None], shift[:, None]
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    m = normed * (1 + scale) + shift
    stored = m.to(prev.dtype).double()
    change, size = (stored - prev.double()).abs().sum(), prev.double().abs().sum()
    return m, torch.stack([change, size])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["[B, C]", "[1, C]", "[B, 1, C]", "[B, T, C]"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_its_definition_says(shape, rows, dtype):
    x, scale, shift, prev = given(shape, rows, dtype)
    m, sums = truth(x, scale, shift, prev)
    out = torch.full_like(prev, torch.nan)
    found = ops.modulated_l1(x, scale, shift, prev, out)
    assert found.dtype == torch.float32 and found.shape == (2,)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out.double(), m, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double(), sums, rtol=tolerance, atol=1e-6)
    assert torch.equal(found, ops.modulated_l1(x, scale, shift, prev))
    # of what was stored: exactly what a later step compares with
    again = ops.residual_l1(out, torch.zeros_like(out), prev)
    torch.testing.assert_close(found, again, rtol=1e-5, atol=1e-6)


def test_out_may_be_prev_and_the_same_bits_come_again():
    x, scale, shift, prev = given((2, 40, 64), "[B, C]", torch.bfloat16)
    out = torch.empty_like(prev)
    first = ops.modulated_l1(x, scale, shift, prev, out)
    for _ in range(3):
        held = prev.clone()
        assert torch.equal(ops.modulated_l1(x, scale, shift, held, held), first)
        assert torch.equal(held, out)


def test_what_is_not_finite_shows_in_the_sums():
    x, scale, shift, prev = given((1, 4, 8), "[B, C]", torch.float32)
    x[0, 2, 3] = torch.nan
    assert ops.modulated_l1(x, scale, shift, prev)[0].isnan()
    prev[0, 0, 0] = torch.inf
    assert not ops.modulated_l1(x, scale, shift, prev).isfinite().any()


@pytest.mark.parametrize("mutates", [False, True])
def test_opcheck(mutates):
    x, scale, shift, prev = given((2, 6, 8), "[B, 1, C]", torch.float32)
    name = "modulated_l1_" if mutates else "modulated_l1"
    op = getattr(torch.ops.fastcache, name).default
    arguments = (x, scale, shift, prev, 1e-6)
    if mutates:
        arguments = (torch.empty_like(prev), *arguments)
    result = torch.library.opcheck(op, arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"scale": torch.zeros(2, 5)}, ValueError, "scale"),
        ({"shift": torch.zeros(3, 8)}, ValueError, "shift"),
        ({"shift": torch.zeros(2, 8, dtype=torch.float16)}, TypeError, "shift"),
        ({"scale": None}, TypeError, "scale"),
        ({"prev": torch.zeros(2, 5, 8)}, ValueError, "prev"),
        ({"x": torch.zeros(12, 8), "prev": torch.zeros(12, 8)}, ValueError, "x is"),
        ({"out": torch.zeros(1, 1, 8).expand(2, 6, 8)}, ValueError, "out"),
        ({"scale": torch.zeros(2, 8, requires_grad=True)}, ValueError, "scale"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, said):
    x, scale, shift, prev = given((2, 6, 8), "[B, C]", torch.float32)
    arguments = {"x": x, "scale": scale, "shift": shift, "prev": prev, **changes}
    with pytest.raises(error, match=said):
        ops.modulated_l1(**arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["[B, C]", "[B, T, C]"])
def test_modulations_may_be_float32_beside_any_dtype(rows, dtype):
    x, scale, shift, prev = given((2, 9, 40), rows, dtype)
    scale, shift = scale.float() + 1e-4, shift.float() + 1e-4  # no number of a shorter dtype
    m, sums = truth(x, scale, shift, prev)
    out = torch.empty_like(prev)
    found = ops.modulated_l1(x, scale, shift, prev, out)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out.double(), m, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double(), sums, rtol=tolerance, atol=1e-6)


with_kernels = pytest.mark.skipif(
    fastcache.backends()["cpp"] is not True, reason="no C++ kernels here"
)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["[B, C]", "[1, C]", "[B, T, C]"])
@pytest.mark.parametrize("shape", [(2, 131, 1029), (1, 3, 15), (3, 70, 2048)])
def test_cpp_gives_the_same_bits_for_any_thread_count(shape, rows, dtype):
    x, scale, shift, prev = given(shape, rows, dtype)
    m, sums = truth(x, scale, shift, prev)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty_like(prev)
            with fastcache.backend("cpp"):
                found.append((ops.modulated_l1(x, scale, shift, prev, out), out))
    finally:
        torch.set_num_threads(before)
    for one in found:
        assert all(map(torch.equal, one, found[0]))
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(found[0][1].double(), m, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[0][0].double(), sums, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=with_kernels)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_from_zero_keep_their_spread(backend, dtype):
    """A variance as the difference of two large means would have nothing left."""
    x, scale, shift, prev = given((1, 5, 3072), "[B, C]", dtype)
    x = x + 300
    m, _ = truth(x, scale, shift, prev)
    out = torch.empty_like(prev)
    with fastcache.backend(backend):
        ops.modulated_l1(x, scale, shift, prev, out)
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}[dtype]
    torch.testing.assert_close(out.double(), m, rtol=tolerance, atol=tolerance)


def test_a_token_range_of_a_longer_sequence_and_transposed_states_are_read_where_they_lie():
    x, scale, shift, prev = given((2, 40, 32), "[B, T, C]", torch.float32)
    part = slice(5, 31)
    cut = (x[:, part], scale[:, part], shift[:, part], prev[:, part])
    wanted = ops.modulated_l1(*[t.contiguous() for t in cut])
    torch.testing.assert_close(ops.modulated_l1(*cut), wanted, rtol=1e-6, atol=0)
    turned = [t.mT.contiguous().mT for t in cut]
    out = torch.empty_like(turned[0])
    torch.testing.assert_close(ops.modulated_l1(*turned, out), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.double(), truth(*cut)[0], rtol=1e-5, atol=1e-5)


@with_kernels
def test_the_c_kernel_names_what_it_does_not_take():
    x, scale, shift, prev = given((2, 6, 8), "[B, 1, C]", torch.bfloat16)
    sums, op = torch.empty(2), torch.ops.fastcache_C.modulated_l1.default
    for change, said in (
        ({"scale": scale.half(), "shift": shift.half()}, "scale must have the dtype of x"),
        ({"shift": shift.float()}, "shift must have the dtype of scale"),
        ({"scale": scale[..., :4]}, "scale must be dense"),
        ({"shift": shift[:, :, :4].contiguous()}, "shift has another shape"),
    ):
        takes = {"scale": scale, "shift": shift, **change}
        with pytest.raises(RuntimeError, match=said):
            op(sums, x, takes["scale"], takes["shift"], prev, None, 1e-6)
