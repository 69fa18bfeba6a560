# SPDX-License-Identifier: Apache-2.0
"""Inside torch.compile: fullgraph, a fixed number of graphs, outputs equal to eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastcache
from fastcache.graphs.compiled import compile_alone

STEPS = 12
clock = {"t": 0.0}  # what PAB's and FasterCache's callbacks read


def scaled(name: str, lo: float, hi: float) -> tuple[float, float]:
    return (lo / 1000, hi / 1000) if name in tiny.UNIT_TIMESTEPS else (lo, hi)


METHODS: dict[str, tuple[Callable[[str], Any], int]] = {  # config for a model, graphs allowed
    "mag": (
        lambda n: fastcache.MagCacheConfig(mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS),
        2,
    ),
    "first_block": (
        lambda n: fastcache.FirstBlockCacheConfig(threshold=0.5 if n == "QwenImage" else 0.3),
        3,
    ),
    "taylorseer": (lambda n: fastcache.TaylorSeerCacheConfig(cache_interval=3), 2),
    "pab": (
        lambda n: fastcache.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=scaled(n, 100, 800),
            current_timestep_callback=lambda: clock["t"],
        ),
        2,
    ),
    "faster": (
        lambda n: fastcache.FasterCacheConfig(
            is_guidance_distilled=True,
            spatial_attention_timestep_skip_range=scaled(n, -1, 681),
            current_timestep_callback=lambda: clock["t"],
        ),
        4,
    ),
}
RECIPES = {
    "first_block_taylor": (
        lambda n: fastcache.Recipe(fastcache.FirstBlock(0.5, max_skips=3), fastcache.Taylor(1)),
        3,
    ),
    "interval_guided": (
        lambda n: fastcache.Recipe(fastcache.Interval(3), fastcache.Guided(2)),
        2,
    ),
    "interval_checked": (
        lambda n: fastcache.Recipe(
            fastcache.Interval(2, warmup=3),
            fastcache.Guided(3, ridge=0.05, early=True, prior=2, checked=True),
        ),
        2,
    ),
    "first_block_guided": (
        lambda n: fastcache.Recipe(fastcache.FirstBlock(0.5, max_skips=3), fastcache.Guided(1)),
        3,
    ),
    "teacache": (lambda n: fastcache.TeaCacheConfig(0.3, (1, 0)), 3),
    "easycache": (lambda n: fastcache.EasyCacheConfig(0.3, token_stride=1), 2),
    "dbcache": (
        lambda n: fastcache.DBCacheConfig(
            1, 1, 0.5, max_warmup_steps=1, max_continuous_cached_steps=3
        ),
        3,
    ),
    "sencache": (lambda n: fastcache.SenCacheConfig(1.0, 0.01, 5.0 if n == "Flux" else 0.005), 2),
    "interval_taylor2": (
        lambda n: fastcache.Recipe(fastcache.Interval(3), fastcache.Taylor(2)),
        2,
    ),
}


class Graphs:
    """A backend that captures graphs, counts them and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: Any, example_inputs: Any) -> Callable:
        self.count += 1
        return module.forward


def drive(
    cache: fastcache.Cache, name: str, inputs: dict, call: Callable, runs: int = 2
) -> list[Tensor]:
    """Two contexts a step, `runs` runs; all outputs in order."""
    outputs = []
    for _ in range(runs):
        for step in tiny.trajectory(name, inputs, STEPS):
            clock["t"] = float(step["timestep"].reshape(-1)[0])
            for context, scale in (("cond", 1.0), ("uncond", 0.5)):
                step_inputs = {
                    **step,
                    "encoder_hidden_states": step["encoder_hidden_states"] * scale,
                }
                with cache.context(context), torch.no_grad():
                    output = call(**step_inputs, return_dict=False)
                outputs.append((output if isinstance(output, Tensor) else output[0]).clone())
        cache.reset()
    return outputs


def fresh() -> None:
    dynamo.reset()
    counters.clear()


def eager(name: str, config: Any) -> list[Tensor]:
    model, inputs = tiny.build(name)
    with fastcache.enable(model, config) as cache:
        outputs = drive(cache, name, inputs, model)
        assert cache.stats.reused and cache.stats.computed
    return outputs


def assert_quiet(graphs: Graphs, limit: int) -> None:
    assert graphs.count <= limit
    assert not counters["graph_break"]
    assert not counters["recompiles"]


CASES = [
    *((name, m) for name in ("Flux", "Wan3D", "CogVideoX", "LTX", "QwenImage") for m in METHODS),
    *((name, m) for name in ("Flux", "Wan3D") for m in RECIPES),
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_one_graph_per_mode_and_the_same_bits_as_eager(name: str, method: str) -> None:
    make, limit = {**METHODS, **RECIPES}[method]
    expected = eager(name, make(name))
    fresh()
    model, inputs = tiny.build(name)
    graphs = Graphs()
    with fastcache.enable(model, make(name)) as cache:
        compiled = fastcache.compile(model, backend=graphs)
        outputs = drive(cache, name, inputs, compiled)
        count = graphs.count
        more = drive(cache, name, inputs, compiled, runs=1)
    assert graphs.count == count, "a later run must not add graphs"
    assert_quiet(graphs, limit)
    for got, want in zip([*outputs, *more], [*expected, *expected[: len(more)]], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("method", [*METHODS, *RECIPES])
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_frozen_gives_the_same_bits_over_contexts_runs_and_resolutions(method: str) -> None:
    make, limit = {**METHODS, **RECIPES}[method]
    sizes = [{}, {"encoder_hidden_states": 5}]  # another text length: storage of another layout

    def outputs(call: Callable, cache: fastcache.Cache, inputs: dict) -> list[Tensor]:
        found = []
        for size in (*sizes, *sizes):
            given = {k: v[:, : size[k]] if k in size else v for k, v in inputs.items()}
            found += drive(cache, "Wan3D", given, call, runs=1)
        return found

    model, inputs = tiny.build("Wan3D")
    with fastcache.enable(model, make("Wan3D")) as cache:
        expected = outputs(model, cache, inputs)
    fresh()
    model, inputs = tiny.build("Wan3D")
    graphs = Graphs()
    with fastcache.enable(model, make("Wan3D")) as cache:
        compiled = fastcache.compile(model, frozen=True, backend=graphs)
        found = outputs(compiled, cache, inputs)
    assert_quiet(graphs, limit * len(sizes))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


class Scaled(nn.Module):
    """Two blocks, and an attribute that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.scale = 1.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return hidden_states * self.scale


@pytest.mark.parametrize("frozen", [False, True])
def test_a_changed_attribute_is_noticed_unless_frozen(frozen: bool) -> None:
    fresh()
    model, x = Scaled().eval(), torch.randn(1, 4, 8)
    every_other = fastcache.Recipe(fastcache.Interval(2))
    with fastcache.enable(model, every_other), torch.no_grad():
        compiled = fastcache.compile(model, frozen=frozen, backend="eager")
        before = [compiled(x) for _ in range(4)][
            -1
        ]  # a reused step, as is the last one of the next
        model.scale = 3.0
        after = [compiled(x) for _ in range(2)][-1]
        anew = fastcache.compile(model, frozen=frozen, backend="eager")
        assert torch.equal([anew(x) for _ in range(2)][-1], before * 3.0)
    assert torch.equal(after, before * (1.0 if frozen else 3.0))


def test_frozen_refuses_a_guard_filter_of_the_users_and_takes_a_mode() -> None:
    from fastcache.graphs.compiled import frozen_options

    with fastcache.enable(model := Scaled().eval(), fastcache.Recipe(fastcache.Interval(2))):
        with pytest.raises(ValueError, match="guard_filter_fn"):
            fastcache.compile(model, frozen=True, options={"guard_filter_fn": lambda guards: []})
    options = frozen_options({"mode": "reduce-overhead", "fullgraph": True})
    assert options["mode"] is None and options["options"]["triton.cudagraphs"] is True


def test_a_compiled_callable_follows_an_update() -> None:
    fresh()
    model, x = Scaled().eval(), torch.randn(1, 4, 8)

    def run(call: Callable) -> list[Tensor]:
        return [call(x + i) for i in range(7)]

    with fastcache.enable(model, fastcache.Recipe(fastcache.Interval(3))) as cache, torch.no_grad():
        compiled = fastcache.compile(model, backend="eager")
        run(compiled)
        cache.update(fastcache.Recipe(fastcache.Interval(2), fastcache.Taylor(1)))
        cache.stats.clear()
        found, steps = run(compiled), [r.action for r in cache.stats]
        cache.reset()
        for got, want in zip(found, run(model), strict=True):
            assert torch.equal(got, want)
        assert steps == [r.action for r in cache.stats][7:]
    uncached = run(compiled)  # disabled: the model itself
    assert torch.equal(uncached[3], model(x + 3))


@pytest.mark.parametrize("method", ["mag", "taylorseer", "pab", "faster"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_users_own_fullgraph_compile_works(method: str, order: str) -> None:
    name = "Wan3D"
    make, limit = METHODS[method]
    expected = eager(name, make(name))
    fresh()
    model, inputs = tiny.build(name)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True) if order == "before" else None
    with fastcache.enable(model, make(name)) as cache:
        if compiled is None:
            compiled = torch.compile(model, backend=graphs, fullgraph=True)
        outputs = drive(cache, name, inputs, compiled)
    assert graphs.count <= limit
    assert not counters["graph_break"]
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, want)


def test_first_block_under_the_users_fullgraph_compile_names_the_way_out() -> None:
    fresh()
    model, inputs = tiny.build("Wan3D")
    with fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.3)) as cache:
        compiled = torch.compile(model, backend=Graphs(), fullgraph=True)
        with pytest.raises(Exception, match=r"fastcache\.compile"):
            drive(cache, "Wan3D", inputs, compiled)


@pytest.mark.parametrize("name", ["Wan3D", "Flux"])
@pytest.mark.parametrize("method", ["first_block", "first_block_taylor"])
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_first_block_under_the_users_compile_is_uncompiled_and_right(
    name: str, method: str
) -> None:
    make, _ = {**METHODS, **RECIPES}[method]
    model, inputs = tiny.build(name)
    with fastcache.enable(model, make(name)) as cache:
        expected = drive(cache, name, inputs, model)
        decided = [(r.request, r.context, r.step, r.action) for r in cache.stats]
    fresh()
    model, inputs = tiny.build(name)
    graphs = Graphs()
    with fastcache.enable(model, make(name)) as cache:
        compiled = torch.compile(model, backend=graphs)
        with pytest.warns(UserWarning, match=r"fastcache\.compile") as warned:
            outputs = drive(cache, name, inputs, compiled)
        assert [(r.request, r.context, r.step, r.action) for r in cache.stats] == decided
    assert sum("fastcache.compile" in str(w.message) for w in warned) == 1
    assert sum(counters["graph_break"].values()) <= 1
    assert graphs.count == 0
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["mag", "first_block", "taylorseer"])
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_the_users_compile_without_contexts_runs_uncompiled(method: str) -> None:
    make, _ = METHODS[method]

    def run(call: Callable) -> list[Tensor]:
        with torch.no_grad():
            return [
                call(**step, return_dict=False)[0].clone()
                for step in tiny.trajectory("Wan3D", inputs, STEPS)
            ]

    model, inputs = tiny.build("Wan3D")
    with fastcache.enable(model, make("Wan3D")):
        expected = run(model)
    fresh()
    model, inputs = tiny.build("Wan3D")
    with fastcache.enable(model, make("Wan3D")) as cache:
        with pytest.warns(UserWarning, match=r"fastcache\.compile"):
            outputs = run(torch.compile(model, backend=Graphs()))
        assert cache.stats.reused
    assert sum(counters["graph_break"].values()) <= 1
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, want)


def test_an_unarmed_compiled_call_raises() -> None:
    fresh()
    model, inputs = tiny.build("Wan3D")
    make, _ = METHODS["mag"]
    with fastcache.enable(model, make("Wan3D")) as cache:
        compiled = torch.compile(model, backend=Graphs(), fullgraph=True)
        drive(cache, "Wan3D", inputs, compiled, runs=1)
        with pytest.raises(Exception, match="without a context"), torch.no_grad():
            compiled(**inputs, return_dict=False)


def test_a_new_resolution_adds_a_bounded_number_of_graphs() -> None:
    fresh()
    make, _ = METHODS["mag"]
    model, inputs = tiny.build("Wan3D")
    larger = {**inputs, "hidden_states": torch.randn(1, 4, 2, 16, 32)}
    graphs, counts = Graphs(), []
    with fastcache.enable(model, make("Wan3D")) as cache:
        compiled = fastcache.compile(model, backend=graphs)
        for given in (inputs, larger, inputs, larger):
            outputs = drive(cache, "Wan3D", given, compiled, runs=1)
            assert all(o.shape == outputs[0].shape for o in outputs)
            counts.append(graphs.count)
    assert counts[0] == 2
    assert counts[1] <= 4
    assert counts[1] == counts[2] == counts[3]


def test_a_new_resolution_in_the_users_compile_is_computed_and_then_cached() -> None:
    fresh()
    make, _ = METHODS["mag"]
    model, inputs = tiny.build("Wan3D")
    larger = {**inputs, "hidden_states": torch.randn(1, 4, 2, 16, 32)}
    with torch.no_grad():
        plain = model(**larger, return_dict=False)[0]
    with fastcache.enable(model, make("Wan3D")) as cache:
        compiled = torch.compile(model, backend=Graphs(), fullgraph=True)
        drive(cache, "Wan3D", inputs, compiled, runs=1)
        with cache.context("cond"), torch.no_grad():
            first = compiled(**larger, return_dict=False)[0]
        assert torch.allclose(first, plain, atol=1e-5)
        drive(cache, "Wan3D", larger, compiled, runs=1)
        assert sum(r.action == "reuse" for r in cache.stats[-24:]) > 10


def test_disable_gives_back_an_uncached_model_under_compile() -> None:
    fresh()
    model, inputs = tiny.build("Wan3D")
    with torch.no_grad():
        plain = model(**inputs, return_dict=False)[0]
    cache = fastcache.enable(model, METHODS["mag"][0]("Wan3D"))
    compiled = torch.compile(model, backend=Graphs(), fullgraph=True)
    drive(cache, "Wan3D", inputs, compiled, runs=1)
    cache.disable()
    with torch.no_grad():
        assert torch.equal(compiled(**inputs, return_dict=False)[0], plain)


class PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.1 * torch.tanh(self.attn(hidden_states))


class PlainModel(nn.Module):
    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(width) for _ in range(depth))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.mark.parametrize("method", ["mag", "first_block", "taylorseer", "pab"])
def test_inductor_agrees_with_eager_on_a_plain_model(method: str) -> None:
    fresh()
    torch.manual_seed(0)
    model = PlainModel().eval().requires_grad_(False)
    start, drift = torch.randn(1, 8, 16), torch.randn(1, 8, 16)

    def run(cache: fastcache.Cache, call: Callable) -> list[Tensor]:
        outputs = []
        for i in range(STEPS):
            clock["t"] = 1000.0 - 80 * i
            with cache.context("cond", step_index=i), torch.no_grad():
                outputs.append(call(start + 0.02 * i * drift).clone())
        return outputs

    make, _ = METHODS[method]
    with fastcache.enable(model, make("plain")) as cache:
        expected = run(cache, model)
    with fastcache.enable(model, make("plain")) as cache:
        compiled = fastcache.compile(model)
        outputs = run(cache, compiled) + run(cache, compiled)
        assert cache.stats.reused
    for got, want in zip(outputs, expected * 2, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


class Turned(PlainModel):
    """Hidden states that are channels first in memory, as behind a patch embedding; a norm reads the last ones."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = super().forward(torch.sigmoid(hidden_states).transpose(1, 2))
        return nn.functional.layer_norm(x, x.shape[2:])


@pytest.mark.parametrize("what", [fastcache.Taylor(2), fastcache.Guided(2)], ids=str)
def test_inductor_reads_a_history_beside_a_transposed_value(what: Any) -> None:
    """Inductor of torch 2.11 wrote C++ that does not compile, where a row was read at an index."""
    fresh()
    torch.manual_seed(0)
    model = Turned(24).eval().requires_grad_(False)
    start, drift = torch.randn(1, 24, 128), torch.randn(1, 24, 128)
    with fastcache.enable(model, fastcache.Recipe(fastcache.Interval(3), what)) as cache:
        runs = []
        for call in (model, fastcache.compile(model)):
            outputs = []
            for i in range(STEPS):
                with cache.context(step_index=i), torch.no_grad():
                    outputs.append(call(start + 0.1 * i * drift).clone())
            runs.append(outputs)
        assert cache.stats.reused
    for got, want in zip(*runs, strict=True):
        assert torch.allclose(got, want, atol=1e-4)


def test_weights_of_each_module_reach_compiled_code() -> None:
    """They were taken as zeros there, since no weights were staged for modules that have their own."""
    torch.manual_seed(0)
    model = PlainModel().eval().requires_grad_(False)
    start, drift = torch.randn(1, 8, 16), torch.randn(1, 8, 16)
    each = {block.attn: 0.2 * i for i, block in enumerate(model.blocks)}
    recipe = fastcache.Recipe(
        fastcache.Interval(3),
        fastcache.Extrapolate(weight=each.__getitem__),
        where=fastcache.Modules(("blocks.*attn",)),
    )

    def run(cache: fastcache.Cache, call: Callable) -> list[Tensor]:
        outputs = []
        for i in range(STEPS):
            with cache.context(), torch.no_grad():
                outputs.append(call(start + 0.1 * i * drift).clone())
        assert cache.stats.reused
        return outputs

    fresh()
    graphs = Graphs()
    with fastcache.enable(model, recipe) as cache:
        expected = run(cache, model)
    with fastcache.enable(model, recipe) as cache:
        outputs = run(cache, fastcache.compile(model, backend=graphs))
    assert_quiet(graphs, 2)
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["mag", "first_block", "taylorseer", "pab"])
def test_regional_compilation_keeps_working(method: str) -> None:
    name = "Flux"
    make, _ = METHODS[method]
    expected = eager(name, make(name))
    fresh()
    model, inputs = tiny.build(name)
    with fastcache.enable(model, make(name)) as cache:
        graphs = Graphs()
        model.compile_repeated_blocks(backend=graphs, fullgraph=True)
        outputs = drive(cache, name, inputs, model)
    assert graphs.count <= 9
    assert not counters["graph_break"]
    for got, want in zip(outputs, expected, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they can be had")
def test_cudagraphs_without_a_device_are_refused() -> None:
    model = PlainModel().eval()
    with (
        fastcache.enable(model, fastcache.Recipe(fastcache.Interval(3), fastcache.Reuse())),
        pytest.raises(ValueError, match="cudagraphs"),
    ):
        fastcache.compile(model, cudagraphs=True)


def shift(new: Tensor, newer: Tensor, older: Tensor) -> None:
    """What state code does: newer to older first, directly."""
    older.copy_(newer)
    newer.copy_(new)


def shift_by_clone(new: Tensor, newer: Tensor, older: Tensor) -> None:
    """Miscompiled by Inductor before torch 2.15 (pytorch issue 198131)."""
    kept = newer.clone()
    newer.copy_(new)
    older.copy_(kept)


MISCOMPILED = pytest.mark.xfail(torch.__version__ < (2, 15), strict=True, reason="Inductor")


@pytest.mark.parametrize("fn", [shift, pytest.param(shift_by_clone, marks=MISCOMPILED)])
def test_history_shift(fn: Callable) -> None:
    """The strict xfail says where the miscompile is gone; the rule stays as long as older ones are supported."""
    fresh()
    new, newer, older = (torch.full((64,), v) for v in (1.0, 2.0, 3.0))
    torch.compile(fn, fullgraph=True)(new, newer, older)
    assert newer.eq(1).all()
    assert older.eq(2).all()


def test_a_module_is_compiled_where_torch_cannot_isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no code object to copy, unlike a function."""
    monkeypatch.setattr("fastcache.graphs.compiled.ISOLATES", False)
    fresh()
    module, graphs, x = nn.Linear(4, 4), Graphs(), torch.randn(2, 4)
    alone = [compile_alone(module, {"backend": graphs}) for _ in range(2)]
    for compiled in alone:
        assert torch.equal(compiled(x), module(x))
    assert graphs.count == 2


def test_modes_stay_apart_where_torch_cannot_isolate_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.12 and before: a code object per mode instead of `isolate_recompiles`."""
    monkeypatch.setattr("fastcache.graphs.compiled.ISOLATES", False)
    fresh()
    make, limit = METHODS["first_block"]
    model, inputs = tiny.build("Wan3D")
    graphs = Graphs()
    with fastcache.enable(model, make("Wan3D")) as cache:
        drive(cache, "Wan3D", inputs, fastcache.compile(model, backend=graphs))
        assert cache.stats.reused
    assert_quiet(graphs, limit)
