# SPDX-License-Identifier: Apache-2.0
"""One rule for layouts: whatever strides come, every op gives what the reference gives, and says what had no kernel.

The file runs once more in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import interpreted
import pytest
import tiny
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache import FirstBlock, Guided, Interval, Recipe, Reuse, Taylor, ops
from fastcache.ops import dispatch, reference
from fastcache.storage.allocate import strides_of
from fastcache.storage.state import State

E4M3 = torch.float8_e4m3fn
KERNELS = "triton" if interpreted.INTERPRETS else "cpp"
pytestmark = pytest.mark.skipif(
    dispatch.status(KERNELS) is not True, reason=str(dispatch.status(KERNELS))
)
SHAPE = (3, 8, 16)


@pytest.mark.gate
@interpreted.starts_interpreter
def test_the_same_in_tritons_interpreter() -> None:
    interpreted.run_interpreted(__file__)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with fastcache.backend(KERNELS):
        yield


# --- ways to lie in memory -----------------------------------------------------------------------------


def permuted(t: Tensor, order: tuple[int, ...]) -> Tensor:
    """A copy whose dimensions lie in this order, outermost first."""
    back = sorted(range(t.dim()), key=order.__getitem__)
    return t.permute(order).contiguous().permute(back)


def token_range(t: Tensor) -> Tensor:
    whole = torch.full((t.shape[0], t.shape[1] + 5, t.shape[2]), 9.0, dtype=t.dtype)
    whole[:, 2 : 2 + t.shape[1]] = t
    return whole[:, 2 : 2 + t.shape[1]]


def turned_range(t: Tensor) -> Tensor:
    """Some tokens of a transposed tensor."""
    whole = torch.full((t.shape[0], t.shape[2], t.shape[1] + 5), 9.0, dtype=t.dtype).mT
    whole[:, 2 : 2 + t.shape[1]] = t
    return whole[:, 2 : 2 + t.shape[1]]


def every_other(t: Tensor) -> Tensor:
    whole = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 9.0, dtype=t.dtype)
    whole[..., ::2] = t
    return whole[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    **{
        f"order {order}": lambda t, order=order: permuted(t, order)
        for order in itertools.permutations(range(3))
        if order != (0, 1, 2)
    },
    "token range": token_range,
    "turned range": turned_range,
    "every other": every_other,
}


def draw(count: int, dtype: torch.dtype = torch.float32, shape: Any = SHAPE) -> list[Tensor]:
    """Small whole numbers over 8: sums of them are exact whatever the order, also in bfloat16."""
    g = torch.Generator().manual_seed(count)
    return [(torch.randint(-16, 17, shape, generator=g) / 8).to(dtype) for _ in range(count)]


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


# --- every op in every layout ------------------------------------------------------------------------------


def each(t: Tensor) -> Tensor:
    """Weights of every sample, of three terms, exact in bfloat16."""
    return torch.tensor([[1.0, -0.5, 0.25], [2.0, 0.5, -1.0], [0.25, 1.0, -2.0]])[: t.shape[0]]


Run = Callable[[Any, list[Tensor]], Any]
# name -> tensors (the last is written to), and a call of `fastcache.ops` or of the reference by its own order
OPS: dict[str, tuple[int, Run, Run]] = {
    "residual_l1": (
        3,
        lambda o, t: o.residual_l1(*t),
        lambda r, t: r.residual_l1(*t),
    ),
    "residual_l1 out": (
        4,
        lambda o, t: o.residual_l1(*t),
        lambda r, t: r.residual_l1(*t),
    ),
    "residual_l1 per sample": (
        4,
        lambda o, t: o.residual_l1(*t, per_sample=True),
        lambda r, t: r.residual_l1(*t, per_sample=True),
    ),
    "residual_magnitude": (
        3,
        lambda o, t: o.residual_magnitude(*t),
        lambda r, t: r.residual_magnitude(*t),
    ),
    "residual_magnitude per sample": (
        4,
        lambda o, t: o.residual_magnitude(*t, per_sample=True),
        lambda r, t: r.residual_magnitude(*t, per_sample=True),
    ),
    "residual_store": (
        3,
        lambda o, t: o.residual_store(*t),
        lambda r, t: r.residual_store(t[2], t[0], t[1]),
    ),
    "residual_apply": (
        3,
        lambda o, t: o.residual_apply(*t),
        lambda r, t: r.residual_apply(t[2], t[0], t[1]),
    ),
    "linear_combine": (
        4,
        lambda o, t: o.linear_combine(t[:3], [1.0, -0.5, 0.25], t[3]),
        lambda r, t: r.linear_combine(t[3], t[:3], [1.0, -0.5, 0.25]),
    ),
    "linear_combine device": (
        4,
        lambda o, t: o.linear_combine(t[:3], torch.tensor([1.0, 7, -0.5, 7, 0.25])[::2], t[3]),
        lambda r, t: r.linear_combine(t[3], t[:3], [1.0, -0.5, 0.25]),
    ),
    "linear_combine per sample": (
        4,
        lambda o, t: o.linear_combine(t[:3], each(t[0]), t[3]),
        lambda r, t: r.combine_samples(t[3], t[:3], each(t[0])),
    ),
    "taylor_update": (
        3,
        lambda o, t: o.taylor_update_(t[1:], t[0], 0.5, 2),
        lambda r, t: r.taylor_update(t[1:], t[0], 0.5, 2),
    ),
    "guided_weights": (
        4,
        lambda o, t: o.guided_weights(t[0], t[1:], torch.tensor([1.0, 7.0, 0.5])[::2]),
        lambda r, t: r.guided_solve(
            r.guided_sums(t[0], t[1:]), torch.tensor([1.0, 0.5]), 0.003, True
        ),
    ),
    "guided_weights per sample": (
        4,
        lambda o, t: o.guided_weights(t[0], t[1:], torch.tensor([1.0, 0.5]), per_sample=True),
        lambda r, t: r.guided_solve(
            r.guided_sums(t[0], t[1:], True), torch.tensor([1.0, 0.5]), 0.003, True
        ),
    ),
}


def agree(name: str, layouts: list[str], dtype: torch.dtype = torch.float32) -> None:
    count, run, truth = OPS[name]
    plain = draw(count, dtype)
    given = [LAYOUTS[layout](t) for layout, t in zip(layouts, plain, strict=True)]
    want, got = truth(reference, plain), run(ops, given)
    if got is not None and want is not None:
        close(got, want)
    for after, expected in zip(given, plain, strict=True):
        close(after, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_an_op_in_one_layout(name: str, layout: str) -> None:
    agree(name, [layout] * OPS[name][0])


@pytest.mark.parametrize("name", OPS)
def test_an_op_in_mixed_layouts(name: str) -> None:
    for odd, layout in itertools.product(range(OPS[name][0]), ("contiguous", "order (0, 2, 1)")):
        for other in LAYOUTS:
            layouts = [layout] * OPS[name][0]
            layouts[odd] = other
            agree(name, layouts)


@pytest.mark.parametrize("name", OPS)
def test_an_op_on_transposed_bfloat16(name: str) -> None:
    agree(name, ["order (0, 2, 1)"] * OPS[name][0], torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_guidance_half_in_every_layout(layout: str) -> None:
    cond, low, high = draw(3)
    (want,) = draw(1, shape=(6, 8, 16))
    reference.guidance_combine(want, cond, low, high, 0.5, 2.0)
    given = [LAYOUTS[layout](t) for t in (cond, low, high)]
    close(ops.guidance_combine(*given, 0.5, 2.0), want)
    out = LAYOUTS[layout](torch.zeros_like(want))
    close(ops.guidance_combine(cond, low, high, 0.5, 2.0, out=out), want)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float8_in_every_layout(layout: str, base: bool) -> None:
    y, x = draw(2)
    at_y, at_x = (LAYOUTS[layout](t) for t in (y, x))
    q, scale = torch.empty(SHAPE, dtype=E4M3), torch.empty(SHAPE[:-1])
    reference.quantize_store(q, scale, y, x if base else None)
    got = ops.quantize_store(at_y, at_x if base else None)
    assert torch.equal(got[0].float(), q.float()) and torch.equal(got[1], scale)
    at_q = LAYOUTS[layout](q.float()).to(E4M3)
    apart = torch.full((*scale.shape, 2), 7.0)[..., 0]  # scales with gaps
    ops.quantize_store(at_y, at_x if base else None, (at_q, apart))
    assert torch.equal(at_q.float(), q.float()) and torch.equal(apart, scale)
    want, out = torch.empty(SHAPE), LAYOUTS[layout](torch.zeros(SHAPE))
    reference.quantized_combine(want, x if base else None, [q, q], [scale, scale], [1.5, -0.25])
    ops.quantized_combine(at_x if base else None, [at_q, q], [apart, scale], [1.5, -0.25], out)
    close(out, want)


# --- the rule itself -----------------------------------------------------------------------------------------


def ran(op: str, tensors: list[Tensor], outputs: int = 0, per_sample: bool = False) -> list[Tensor]:
    """What a kernel of an op is given."""
    run, views = dispatch.resolve(op, tensors, outputs, per_sample)
    assert run is dispatch.function(KERNELS, op) is not dispatch.function("reference", op)
    return views


def same_memory(views: list[Tensor], tensors: list[Tensor]) -> list[bool]:
    return [v.data_ptr() == t.data_ptr() for v, t in zip(views, tensors, strict=True)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_dense_tensors_of_one_order_are_run_flat_without_a_copy(order: tuple) -> None:
    tensors = [permuted(t, order) for t in draw(4)]
    for op, outputs in (("residual_l1", 1), ("linear_combine", 1), ("taylor_update", 3)):
        views = ran(op, tensors, outputs)
        assert all(same_memory(views, tensors)) and all(v.is_contiguous() for v in views)
    rows = ran("residual_magnitude", tensors[:3])
    assert all(v.shape[-1] == SHAPE[-1] and v.is_contiguous() for v in rows)
    assert all(same_memory(rows, tensors[:3])) == (order[-1] == 2)
    each = ran("residual_l1", tensors[:3], per_sample=True)
    assert all(v.shape[0] == SHAPE[0] and v.is_contiguous() for v in each)
    assert all(same_memory(each, tensors[:3])) == (order[0] == 0)


def test_what_lies_apart_from_the_others_is_copied_once() -> None:
    y, x, prev, out = draw(4)
    turned = [permuted(t, (0, 2, 1)) for t in (x, prev, out)]
    given = [y, turned[0], turned[1]]
    assert same_memory(ran("residual_l1", given), given) == [False, True, True]
    given = [y, turned[0], turned[2]]
    assert same_memory(ran("residual_store", given, 1), given) == [False, True, True]
    given = [turned[0], turned[1], out]  # what is written to decides
    assert same_memory(ran("residual_apply", given, 1), given) == [False, False, True]


def test_sizes_of_one_do_not_count() -> None:
    for shape in ((1, 8, 16), (3, 1, 16), (3, 8, 1), (1, 1, 16), (1, 1, 1)):
        tensors = [permuted(t, (2, 0, 1)) for t in draw(3, shape=shape)]
        assert all(same_memory(ran("residual_l1", tensors), tensors))
    assert dispatch.outermost_first((2, 1, 8), (8, 3, 1)) == (0, 1, 2)
    assert dispatch.outermost_first((1, 4), (999, 1)) == (0, 1)
    assert dispatch.outermost_first((2, 4, 8), (0, 8, 1)) is None


# --- storage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_storage_lies_like_the_value_that_it_is_for(layout: str) -> None:
    (value,) = draw(1)
    strides = strides_of(LAYOUTS[layout](value))
    assert (strides is None) == (layout not in ("order (0, 2, 1)", "turned range"))
    if strides is not None:
        assert strides == LAYOUTS["order (0, 2, 1)"](value).stride()


def buffers(state: State) -> list[Tensor]:
    return [
        t for units in state.units for u in units.values() for s in u.streams for t in s.tensors()
    ]


def cached_run(name: str, recipe: Any, **options: Any) -> tuple[list[Tensor], fastcache.Cache]:
    model, inputs = tiny.build(name)
    outputs = []
    with fastcache.enable(model, recipe, **options) as cache:
        for i, step in enumerate(tiny.trajectory(name, inputs, 6)):
            with cache.context("cond", step_index=i):
                outputs.append(tiny.output(model, step).clone())
        held = cache.denoisers[0].pool.states[0, "cond"]
        for t in (t for t in buffers(held) if t.dim() == 4):
            assert t.dtype == E4M3 or t.stride(2) == 1 < t.stride(3), "rows lie like hidden states"
    return outputs, cache


TRANSPOSED = ("HunyuanVideo", "SkyReelsV2")  # their patch embedding leaves hidden states transposed
RECIPES = {
    "reuse": Recipe(Interval(3), Reuse()),
    "taylor": Recipe(Interval(3), Taylor(2)),
    "first_block": Recipe(FirstBlock(0.5, max_skips=2), Reuse()),
    "guided": Recipe(Interval(3), Guided(2)),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, E4M3], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_models_with_transposed_hidden_states(name: str, recipe: str, dtype: Any) -> None:
    if recipe == "guided" and dtype == E4M3:
        pytest.skip("refused: weights on the device")
    with fastcache.backend("reference"):
        want, _ = cached_run(name, RECIPES[recipe], cache_dtype=dtype, backend="reference")
    got, cache = cached_run(name, RECIPES[recipe], cache_dtype=dtype, backend=KERNELS)
    assert cache.stats.reused
    for a, b in zip(got, want, strict=True):
        assert ((a - b).norm() / b.norm()).item() < (1e-2 if dtype else 1e-5)


@pytest.mark.skipif(interpreted.INTERPRETS, reason="no op runs in a graph")
@pytest.mark.parametrize("name", TRANSPOSED)
def test_graphs_read_and_write_transposed_storage(name: str) -> None:
    recipe = RECIPES["taylor"]
    want, _ = cached_run(name, recipe)
    model, inputs = tiny.build(name)
    torch._dynamo.reset()
    with fastcache.enable(model, recipe) as cache:
        compiled = fastcache.compile(model, backend="eager")
        for i, step in enumerate(tiny.trajectory(name, inputs, 6)):
            with cache.context("cond", step_index=i):
                torch.testing.assert_close(tiny.output(compiled, step), want[i])
        (buffer,) = buffers(cache.denoisers[0].pool.states[0, "cond"])
        assert buffer.stride(2) == 1 < buffer.stride(3) and cache.stats.reused


def test_offloaded_storage_comes_back_in_its_layout() -> None:
    model, inputs = tiny.build("SkyReelsV2")
    recipe, steps = Recipe(Interval(3), Taylor(1)), tiny.trajectory("SkyReelsV2", inputs, 6)
    with fastcache.enable(model, recipe) as cache:
        want = [one(model, cache, step, i, 0) for i, step in enumerate(steps)]
        size = cache.nbytes()
    with fastcache.enable(model, recipe, max_bytes=size, offload=True) as cache:
        for i, step in enumerate(steps):
            for request in (0, 1):  # each sends the other's storage away
                got = one(model, cache, step, i, request)
                torch.testing.assert_close(got, want[i])
                (buffer,) = buffers(cache.denoisers[0].pool.states[request, "cond"])
                assert buffer.stride(2) == 1 < buffer.stride(3)


def one(model: nn.Module, cache: fastcache.Cache, step: dict, i: int, request: int) -> Tensor:
    with cache.context("cond", step_index=i, request=request):
        return tiny.output(model, step).clone()


# --- what had no kernel is said ------------------------------------------------------------------------------


class Double(nn.Module):
    """A model whose hidden states are float64, which no kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(toys.Block() for _ in range(3)).double()

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def drive(cache: fastcache.Cache, model: nn.Module, tokens: int) -> list[str]:
    """What a run of four steps warns of."""
    value = torch.randn(1, tokens, toys.DIM, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for i in range(4):
            with cache.context("cond", step_index=i):
                model(value)
    return [str(w.message) for w in caught if "reference" in str(w.message)]


@interpreted.in_interpreter
def test_a_large_tensor_without_a_kernel_is_counted_and_said_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatch, "LARGE", 6 * toys.DIM * 8)
    monkeypatch.setattr(dispatch, "_takes_dtypes", lambda *a: False)
    model = Double()
    recipe = Recipe(Interval(2), Reuse())
    with fastcache.enable(model, recipe, backend=KERNELS, cache_dtype=torch.bfloat16) as cache:
        assert not drive(cache, model, 6) and not cache.stats.fallbacks  # not more than LARGE
        said = drive(cache, model, 7)
        assert sorted(message.split()[1] for message in said) == [
            "residual_apply",
            "residual_store",
        ]
        assert all("(1, 7, 8)" in message and KERNELS in message for message in said)
        assert not drive(cache, model, 7)
        assert cache.stats.fallbacks == {"residual_store": 4, "residual_apply": 4}
        assert "4 x residual_store" in cache.summary()
        ops.residual_store(*(torch.randn(1, 40, 40) for _ in range(3)))  # nobody's call
        assert cache.stats.fallbacks.total() == 8
    with fastcache.enable(model, recipe, backend="reference") as cache:
        assert not drive(cache, model, 7) and not cache.stats.fallbacks  # it was asked for


def test_on_a_processor_nothing_is_said(monkeypatch: Any) -> None:
    if KERNELS == "triton":
        pytest.skip("stands for a GPU")
    monkeypatch.setattr(dispatch, "LARGE", 0)
    model = Double()
    with fastcache.enable(model, Recipe(Interval(2), Reuse()), cache_dtype=E4M3) as cache:
        assert not drive(cache, model, 7) and not cache.stats.fallbacks
