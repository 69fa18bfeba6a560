# SPDX-License-Identifier: Apache-2.0
"""The C++ internals through pybind11: instruction sets, chunks, conversions, loading."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastcache.ops.backends import cpp

box = pytest.importorskip(
    "fastcache._native_test", reason="white-box module not built: pip install -e . with a compiler"
)

DTYPES = {box.Type.f32: torch.float32, box.Type.f16: torch.float16, box.Type.bf16: torch.bfloat16}
TYPES = list(DTYPES)
PAIRS = list(itertools.product(TYPES, TYPES))
ISAS = box.available()


def random(n, kind, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DTYPES[kind])


def combine(isa, kind, terms, n):
    """The weighted sum of (tensor, type, weight) terms."""
    out = torch.full((n,), torch.nan, dtype=DTYPES[kind])
    box.combine(isa, kind, out.data_ptr(), [(t.data_ptr(), k, w) for t, k, w in terms], n)
    return out


def convert(isa, source, kind, to):
    return combine(isa, to, [(source, kind, 1.0)], source.numel())


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def same(a, b):
    """Equal bits, except that any NaN equals any other."""
    nan = torch.isnan(a)
    return torch.equal(nan, torch.isnan(b)) and torch.equal(bits(a)[~nan], bits(b)[~nan])


# --- instruction sets agree -------------------------------------------------------------------


@given(st.sampled_from(PAIRS), st.integers(1, 5000), st.integers(1, 3), st.integers(1, 5))
def test_every_instruction_set_and_order_of_chunks_gives_the_same_sums(
    pair, length, samples, grain
):
    value, stored = pair
    n = samples * length
    y, x, prev = random(n, value, 1), random(n, value, 2), random(n, stored, 3)
    results = []
    for isa, g in itertools.product(ISAS, (1, grain)):
        out = torch.full_like(prev, torch.nan)
        pointers = [t.data_ptr() for t in (y, x, prev, out)]
        sums = box.residual_l1(isa, value, stored, *pointers, samples, length, g)
        ratios = box.residual_magnitude(isa, value, stored, *pointers, samples, 1, length, 1e-8, g)
        results.append((sums, ratios, bits(out).tolist()))
    assert all(r == results[0] for r in results)


@given(
    st.sampled_from(PAIRS), st.booleans(), st.integers(1, 3), st.integers(1, 40),
    st.integers(1, 3000), st.integers(1, 5),
)  # fmt: skip
@example(PAIRS[4], False, 1, 3, box.CHUNK + 5, 2)  # rows longer than a chunk
def test_every_instruction_set_and_order_of_chunks_gives_the_same_modulated_input(
    pair, in_float, samples, tokens, width, grain
):
    value, stored = pair
    by = box.Type.f32 if in_float else value
    n = samples * tokens * width
    x, prev = random(n, value, 1), random(n, stored, 2)
    scale, shift = random(samples * width, by, 3), random(samples * width, by, 4)
    results = []
    for isa, g in itertools.product(ISAS, (1, grain)):
        out = torch.full_like(prev, torch.nan)
        pointers = [t.data_ptr() for t in (x, scale, shift, prev, out)]
        sizes = (samples, tokens, width)
        sums = box.modulated_l1(isa, value, by, stored, *pointers, *sizes, 1e-6, g)
        results.append((sums, bits(out).tolist()))
    assert all(r == results[0] for r in results)


def test_chunks_in_any_order_give_the_same_sums_on_a_tensor_of_many_chunks():
    n = 5 * box.CHUNK + 77
    tensors = [random(n, box.Type.f32, i) for i in range(3)]
    pointers = [t.data_ptr() for t in tensors]
    results = [
        box.residual_l1(isa, box.Type.f32, box.Type.f32, *pointers, 0, 1, n, grain)
        for isa in ISAS
        for grain in (1, 2, 6)
    ]
    assert all(r == results[0] for r in results)


@given(
    st.sampled_from(PAIRS), st.integers(1, 2), st.integers(1, 3), st.integers(1, 30),
    st.integers(1, 2000), st.booleans(), st.integers(1, 5),
)  # fmt: skip
@example(PAIRS[0], 2, 2, 3, box.CHUNK + 5, False, 3)  # rows longer than a chunk
def test_every_instruction_set_layout_and_order_of_chunks_gives_the_same_guided_sums(
    pair, order, samples, rows, width, per_sample, grain
):
    value, stored = pair
    n = samples * rows * width
    guides = [random(n, value if i == 0 else stored, i) for i in range(order + 2)]
    results = []
    for isa, g, apart in itertools.product(ISAS, (1, grain), (1, 3)):
        spread = [
            torch.full((samples * rows, apart, width), torch.nan, dtype=t.dtype) for t in guides
        ]
        for wide, t in zip(spread, guides, strict=True):
            wide[:, 0] = t.reshape(-1, width)
        pointers = [t.data_ptr() for t in spread]
        sizes = (samples, rows, width, apart)
        results.append(box.guided_sums(isa, value, stored, pointers, *sizes, per_sample, g))
    assert all(r == results[0] for r in results)
    assert len(results[0]) == 3 * order * (samples if per_sample else 1)


@given(st.sampled_from(PAIRS), st.integers(1, 300), st.integers(1, 8))
def test_every_instruction_set_gives_the_same_weighted_sums(pair, n, count):
    value, stored = pair
    terms = [(random(n, k, i), k, 0.3 * i - 1) for i, k in zip(range(count), (value, stored) * 4)]  # noqa: B905
    results = [combine(isa, value, terms, n) for isa in ISAS]
    assert all(torch.equal(r, results[0]) for r in results)


@given(st.sampled_from(PAIRS), st.integers(1, 300), st.integers(1, 5))
def test_every_instruction_set_gives_the_same_differences(pair, n, count):
    value, stored = pair
    y, results = random(n, value, 99), []
    for isa in ISAS:
        factors = [random(n, stored, i) for i in range(count)]
        pointers = [f.data_ptr() for f in factors]
        box.taylor_update(isa, value, stored, pointers, y.data_ptr(), 3.0, n)
        results.append(torch.stack(factors))
    assert all(torch.equal(r, results[0]) for r in results)


# --- conversions ------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [box.Type.f16, box.Type.bf16])
def test_all_16_bit_values_widen_exactly_and_come_back(isa, kind):
    values = torch.arange(2**16).to(torch.int32).to(torch.int16).view(DTYPES[kind])
    wide = convert(isa, values, kind, box.Type.f32)
    assert same(wide, values.float())
    assert same(convert(isa, wide, box.Type.f32, kind), values)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [box.Type.f16, box.Type.bf16])
def test_floats_narrow_to_the_nearest_even_as_torch_narrows_them(isa, kind):
    """Every 16-bit value, the midpoint above it and the midpoint's neighbours; and random bits."""
    values = torch.arange(2**16).to(torch.int32).to(torch.int16).view(DTYPES[kind]).float()
    half = 2**12 if kind == box.Type.f16 else 2**15
    steps = [bits(values) + d for d in (half - 1, half, half + 1)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    for source in (*steps, noise):
        floats = source.view(torch.float32).contiguous()
        assert same(convert(isa, floats, box.Type.f32, kind), floats.to(DTYPES[kind]))


# --- chunks -----------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4 * box.CHUNK))
def test_chunks_cover_each_sample_once_and_never_cross(samples, length):
    chunks = box.chunks(samples, length)
    assert [c for c, *_ in chunks] == list(range(len(chunks)))
    for sample in range(samples):
        own = [(offset, count) for _, b, offset, count in chunks if b == sample]
        assert all(0 < count <= box.CHUNK for _, count in own)
        ends = list(itertools.accumulate(count for _, count in own))
        assert [offset for offset, _ in own] == [0, *ends[:-1]] and ends[-1] == length


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_chooses_the_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FASTCACHE_CPU_CAPABILITY", isa)
    assert box.capability() == isa


def test_reasons_for_not_running_are_said(monkeypatch):
    monkeypatch.setenv("FASTCACHE_CPU_CAPABILITY", "sse9")
    assert "sse9, must be default, avx2 or avx512" in str(cpp.available.__wrapped__())
    monkeypatch.setenv("FASTCACHE_DISABLE_EXT", "1")
    assert "FASTCACHE_DISABLE_EXT" in str(cpp.available.__wrapped__())


def test_an_absent_library_and_a_broken_one_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp, "LIBRARY", tmp_path / "_cpu_ops.so")
    assert "not built" in str(cpp.available.__wrapped__())
    cpp.LIBRARY.write_bytes(b"not a library")
    assert str(cpp.LIBRARY) in str(cpp.available.__wrapped__())  # the dynamic loader's words
