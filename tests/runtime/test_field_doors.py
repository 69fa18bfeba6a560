# SPDX-License-Identifier: Apache-2.0
"""What is refused, and what works though it is unusual: gradients, float64, containers, offloading, names.

Each value is held against the uncached model or worked out by hand.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import tiny
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache import FirstBlockCacheConfig, Guided, Interval, Mask, Recipe, Reuse, Taylor
from fastcache.ops import dispatch

HIDDEN = "ignore::fastcache.FastcacheWarning"


def masked(text: str, what: Any = None, where: Any = None) -> Recipe:
    rule = Mask(compute=[int(c == "C") for c in text])
    return Recipe(rule, what or Reuse(), where) if where else Recipe(rule, what or Reuse())


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("trained_by", ["parameters", "input too"])
def test_a_model_in_training_with_gradients_is_refused(compiled, trained_by):
    model, (call,) = toys.model().requires_grad_().train(), toys.inputs(1)
    if trained_by == "input too":
        call["hidden_states"].requires_grad_()
    with fastcache.enable(model, masked("CC")) as cache:
        target = fastcache.compile(model, backend="eager") if compiled else model
        with pytest.raises(ValueError, match="training mode with gradients on"):
            target(**call)
        assert not len(cache.stats)
        model.eval()
        call["hidden_states"].requires_grad_(False)
        with torch.no_grad():
            got = target(**call)
    with torch.no_grad():
        torch.testing.assert_close(got, model(**call), rtol=0, atol=0)


def gradient(model: Any, call: dict[str, Any]) -> Tensor:
    x = call["hidden_states"].clone().requires_grad_()
    return torch.autograd.grad((model(x, call["timestep"]) ** 2).sum(), x)[0]


RULES = {
    "first block": lambda: FirstBlockCacheConfig(0.5),
    "mask": lambda: masked("C..."),
    "modules": lambda: Recipe(Interval(2), Reuse(), fastcache.Modules((r"\.attn$",))),
    "taylor": lambda: Recipe(Mask(compute=[1, 1, 1, 0], warmup=0, last=False), Taylor(1)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_by_an_input_is_computed(rule, trained, compiled):
    model = toys.model().requires_grad_(trained)
    calls = toys.inputs(4, speed=0.05)
    want = [gradient(model, c) for c in calls]
    with pytest.warns(fastcache.FastcacheWarning, match="an input requires a gradient") as said:
        with fastcache.enable(model, RULES[rule]()) as cache:
            target = fastcache.compile(model, backend="eager") if compiled else model
            for call, right in zip(calls, want, strict=True):
                torch.testing.assert_close(gradient(target, call), right, rtol=0, atol=0)
            assert {r.action for r in cache.stats} == {"compute"}
    assert len([w for w in said if "so its steps are computed" in str(w.message)]) == 1


def test_a_gradient_by_torch_func_is_computed():
    model, calls = toys.model(), toys.inputs(3)

    def loss(run: Any) -> Any:
        return torch.func.grad(lambda x, t: (run(x, t) ** 2).sum())

    want = [loss(model)(c["hidden_states"], c["timestep"]) for c in calls]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fastcache.enable(model, masked("C..")):
            for call, right in zip(calls, want, strict=True):
                got = loss(model)(call["hidden_states"], call["timestep"])
                torch.testing.assert_close(got, right, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compiled", [False, True])
def test_who_forgot_no_grad_gets_the_same_steps_and_no_wrong_gradient(rule, compiled):
    """Parameters that require a gradient are the usual case after from_pretrained."""
    calls = toys.inputs(4, speed=0.05)
    frozen, model = toys.model(), toys.model().requires_grad_(True)
    outputs, seen = {}, {}
    for name, each in (("frozen", frozen), ("trained", model)):
        with fastcache.enable(each, RULES[rule]()) as cache:
            target = fastcache.compile(each, backend="eager") if compiled else each
            outputs[name] = [target(c["hidden_states"], c["timestep"]) for c in calls]
            seen[name] = [r.action for r in cache.stats]
            if name == "frozen":
                assert not any(o.requires_grad for o in outputs[name])
            else:
                for output, action in zip(outputs[name], seen[name], strict=True):
                    assert output.requires_grad
                    if action == "compute":
                        output.sum().backward(retain_graph=True)
                    else:
                        output.mul_(1.0)  # a scheduler may
                        with pytest.raises(RuntimeError, match="this step was reused"):
                            output.sum().backward()
    assert seen["frozen"] == seen["trained"] and "reuse" in seen["frozen"]
    for a, b in zip(outputs["frozen"], outputs["trained"], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)


def test_parameters_inside_the_blocks_alone_get_no_wrong_gradient():
    """As adapters of a fine-tuning are: a reused step skips all of them, and must not look like a constant."""
    model, calls = toys.model(), toys.inputs(3)
    model.blocks[1].requires_grad_(True)
    with fastcache.enable(model, masked("C..")):
        outputs = [model(c["hidden_states"], c["timestep"]) for c in calls]
        with pytest.raises(RuntimeError, match="this step was reused"):
            sum(outputs).sum().backward()  # type: ignore[union-attr]


@pytest.mark.filterwarnings(HIDDEN)
def test_a_run_goes_on_after_a_gradient():
    model, calls = toys.model(), toys.inputs(6)
    want = toys.plain(model, calls)
    with fastcache.enable(model, masked("CC.CC.")) as cache:
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i):
                if i == 1:
                    gradient(model, call)
                else:
                    with torch.no_grad():
                        output = model(**call)
                    if cache.stats[-1].action == "compute":
                        torch.testing.assert_close(output, want[i])
        assert [r.action[0] for r in cache.stats] == list("cccccr")


# --- float64 ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(HIDDEN)
@pytest.mark.parametrize("method", toys.METHODS)
@pytest.mark.parametrize("compiled", [False, True])
def test_float64_runs_as_float32_does(method, compiled):
    """The same schedule, and values that differ by float32's rounding."""
    results = {}
    for dtype in (torch.float32, torch.float64):
        clock, model = toys.Clock(), toys.build(method).to(dtype)
        calls = [
            {k: v.to(dtype) if k != "timestep" else v for k, v in c.items()}
            for c in toys.inputs_for(method)
        ]
        with fastcache.enable(model, toys.config(method, clock)) as cache:
            target = fastcache.compile(model, backend="eager") if compiled else model
            outputs = toys.run(cache, target, calls, clock)
            results[dtype] = outputs, toys.actions(cache)
    (low, seen), (high, again) = results.values()
    assert seen == again and "." in seen
    for a, b in zip(low, high, strict=True):
        assert b.dtype == torch.float64
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", [Reuse(), Taylor(1), Taylor(2), Guided()])
@pytest.mark.parametrize("compiled", [False, True])
def test_float64_keeps_its_precision(what, compiled):
    """The same inputs throughout, so a prediction is what was computed."""
    model, call = toys.model().double(), toys.inputs(1)[0]
    call["hidden_states"] = call["hidden_states"].double()
    recipe = Recipe(fastcache.Mask(compute=[1] * 5 + [0], warmup=0), what)
    with fastcache.enable(model, recipe) as cache, torch.no_grad():
        target = fastcache.compile(model, backend="eager") if compiled else model
        for i in range(6):
            with cache.context("cond", step_index=i):
                got = target(**call)
        assert cache.stats[-1].action == "reuse"
        want = model._fastcache.original(**call)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_kernel_is_asked_for_float64():
    tensors = [torch.zeros(1, 2, 3, dtype=torch.float64) for _ in range(3)]
    for op in ("residual_l1", "residual_store", "linear_combine"):
        run, _ = dispatch.resolve(op, tensors, int(op != "residual_l1"))
        assert run is dispatch.function("reference", op)
    mixed = [tensors[0].float(), tensors[1], tensors[2].float()]
    assert dispatch.resolve("residual_store", mixed, 1)[0] is dispatch.function(
        "reference", "residual_store"
    )


# --- what blocks return -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Both:
    text: Any
    hidden_states: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    note: str = "kept"


Pair = namedtuple("Pair", ["text", "hidden"])
CONTAINERS: dict[str, tuple[Any, Any]] = {
    "dict": (lambda h: {"hidden_states": h}, lambda o: o["hidden_states"]),
    "dict by another name": (lambda h: {"note": None, "x": h}, lambda o: o["x"]),
    "ordered dict": (lambda h: OrderedDict(x=h), lambda o: o["x"]),
    "dataclass": (lambda h: Both(None, h), lambda o: o.hidden_states),
    "frozen dataclass": (lambda h: Frozen(h), lambda o: o.x),
    "named tuple": (lambda h: Pair(None, h), lambda o: o.hidden),
    "list": (lambda h: [h], lambda o: o[0]),
}


class Packed(toys.Block):
    pack: Any = None

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:  # type: ignore[override]
        return self.pack(super().forward(hidden_states, scale))


class Unpacking(toys.Model):
    unpack: Any = None

    def through(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for block in self.blocks:
            hidden = self.unpack(block(hidden))
        return hidden, text


def packing(kind: str) -> nn.Module:
    model = Unpacking(block=Packed)
    pack, model.unpack = CONTAINERS[kind]
    for block in model.blocks:
        block.pack = pack
    return model


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("rule", ["first block", "mask", "busy"])
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_may_return_what_holds_their_streams(kind, rule, compiled):
    model, call = packing(kind), toys.inputs(1)[0]
    recipe = FirstBlockCacheConfig(1e-3) if rule == "first block" else masked("CC..")
    if rule == "busy":
        unpack = model.unpack
        model.unpack = lambda output: unpack(output) + 0.1
    with torch.no_grad():
        want = model(**call)
    with fastcache.enable(model, recipe) as cache, torch.no_grad():
        target = fastcache.compile(model, backend="eager") if compiled else model
        for i in range(4):
            with cache.context("cond", step_index=i):
                torch.testing.assert_close(target(**call), want)
        assert cache.stats[-1].action == "reuse"


class Opaque:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def test_blocks_that_return_an_object_of_their_own_are_refused_by_name():
    model = Unpacking(block=Packed)
    model.unpack = lambda output: output.hidden
    for block in model.blocks:
        block.pack = Opaque
    with fastcache.enable(model, masked("C.")), torch.no_grad():
        with pytest.raises(ValueError, match=r"Packed in 'blocks' returns a Opaque.*BlockAdapter"):
            model(**toys.inputs(1)[0])


# --- offloading ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(HIDDEN)
@pytest.mark.parametrize("guide", ["modulated", "input", "residual"])
@pytest.mark.parametrize("name", ["Wan3D", "Flux"])
def test_a_guide_reads_a_block_that_is_offloaded(name, guide):
    accelerate = pytest.importorskip("accelerate")
    results = []
    for offloads in (False, True):
        model, call = tiny.build(name, 3)
        if offloads:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        recipe = Recipe(Interval(2, warmup=4, last=False), Guided(guide=guide))
        with fastcache.enable(model, recipe) as cache, torch.no_grad():
            outputs = []
            for i in range(7):
                now = {**call, "hidden_states": call["hidden_states"] * (1 + 0.05 * i)}
                with cache.context("cond", step_index=i):
                    outputs.append(model(**now, return_dict=False)[0])
            results.append((outputs, [r.action for r in cache.stats]))
    assert results[0][1] == results[1][1] and "reuse" in results[0][1]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(a, b)


def test_a_table_nobody_holds_is_refused_by_name():
    block = nn.Module()
    with pytest.raises(ValueError, match="'scale_shift_table' of Module, which is offloaded"):
        from fastcache.models.modulation import present

        table = torch.empty(1, 6, 8, device="meta")
        present(block, "scale_shift_table", table, torch.zeros(1))


# --- names of the user's for kinds that a model lacks -------------------------------------------------------


NAMES = ("blocks", "transformer_blocks", "layers")


def pyramid(**changes: Any) -> Any:
    kinds = ("spatial", "temporal", "cross")
    settings: dict[str, Any] = {f"{k}_attention_block_skip_range": 2 for k in kinds}
    settings.update({f"{k}_attention_block_identifiers": NAMES for k in kinds})
    return fastcache.PyramidAttentionBroadcastConfig(
        **{**settings, "current_timestep_callback": lambda: 500, **changes}
    )


@pytest.mark.parametrize(
    ("name", "missing"),
    [("Wan3D", {"temporal"}), ("SD3", {"temporal", "cross"}), ("CogVideoX", {"temporal", "cross"})],
)
def test_a_kind_that_the_model_lacks_is_left_out(name, missing):
    model, _ = tiny.build(name, 2)
    with pytest.warns(fastcache.FastcacheWarning) as said:
        cache = fastcache.enable(model, pyramid())
    told = {
        k
        for w in said
        for k in ("spatial", "temporal", "cross")
        if f"{k}_attention_b" in str(w.message)
    }
    assert told == missing
    assert len(cache.denoisers[0].targets) == 3 - len(missing)
    cache.disable()


def test_spatial_attention_takes_what_several_kinds_name():
    """As upstream does, which asks for spatial attention first."""
    model, _ = tiny.build("Latte", 2)
    everything = (r"attn1",)
    with pytest.warns(fastcache.FastcacheWarning, match="temporal_attention_block_identifiers"):
        cache = fastcache.enable(
            model,
            pyramid(
                spatial_attention_block_identifiers=everything,
                temporal_attention_block_identifiers=everything,
                cross_attention_block_skip_range=None,
            ),
        )
    assert all("attn1" in name for name in cache.denoisers[0].targets[0].hooked())
    assert any("temporal" in name for name in cache.denoisers[0].targets[0].hooked())
    cache.disable()


def test_the_same_of_faster_cache():
    model, _ = tiny.build("Wan3D", 2)
    names = (r"blocks.*attn1",)
    config = fastcache.FasterCacheConfig(
        temporal_attention_block_skip_range=2,
        spatial_attention_block_identifiers=names,
        temporal_attention_block_identifiers=names,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: 500,
    )
    with pytest.warns(fastcache.FastcacheWarning, match="temporal_attention_block_identifiers"):
        cache = fastcache.enable(model, config)
    assert len(cache.denoisers[0].targets) == 1
    cache.disable()


@pytest.mark.filterwarnings(HIDDEN)
@pytest.mark.parametrize(
    "changes",
    [
        {"temporal_attention_block_identifiers": ("nowhere",)},
        {"spatial_attention_block_identifiers": ("nowhere",)},
        {
            "spatial_attention_block_skip_range": None,
            "temporal_attention_block_skip_range": None,
        },
    ],
)
def test_names_that_no_module_has_and_nothing_fitting_stay_errors(changes):
    model, _ = tiny.build("SD3", 2)
    before = dict(vars(model))
    with pytest.raises(ValueError, match="nothing to hook"):
        fastcache.enable(model, pyramid(**changes))
    assert dict(vars(model)) == before


# --- modules that run twice in a call -----------------------------------------------------------------------


class Twice(toys.Model):
    """Guidance inside the forward."""

    def forward(self, hidden_states: Tensor, timestep: Any = None) -> Tensor:  # type: ignore[override]
        both = (
            super().forward(hidden_states, timestep),
            super().forward(0.9 * hidden_states, timestep),
        )
        return 3 * both[0] - 2 * both[1]


@pytest.mark.parametrize("method", ["taylor_seer", "pyramid", "faster"])
@pytest.mark.parametrize("compiled", [False, True])
def test_modules_that_run_twice_say_that_they_compute(method, compiled):
    model, clock, calls, ran = Twice(), toys.Clock(), toys.inputs(10), []
    want = toys.plain(model, calls)
    if not compiled:  # a graph would guard the list that grows
        model.blocks[0].attn.to_q.register_forward_hook(lambda *_: ran.append(1))
    cache = fastcache.enable(model, toys.config(method, clock))
    target = fastcache.compile(model, backend="eager") if compiled else model
    outputs = toys.run(cache, target, calls, clock)
    assert cache.stats.reused == 0 and cache.stats.computed == 10
    assert len(ran) == (0 if compiled else 20)
    for got, right in zip(outputs, want, strict=True):
        torch.testing.assert_close(got, right)
    with pytest.warns(fastcache.FastcacheWarning, match="called twice") as said:
        cache.reset()
        toys.run(cache, target, calls, clock)
        cache.disable()
    assert len([w for w in said if "called twice" in str(w.message)]) == 1


class Partly(toys.Model):
    """One block runs twice, the others once."""

    def through(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        blocks = list(self.blocks)
        for block in (blocks[0], *blocks):
            hidden = block(hidden)
        return hidden, text


@pytest.mark.filterwarnings(HIDDEN)
def test_where_some_modules_run_twice_the_others_are_reused():
    model, clock, calls = Partly(), toys.Clock(), toys.inputs(10)
    ran: dict[int, int] = {}
    for i, block in enumerate(model.blocks):
        block.attn.to_q.register_forward_hook(lambda *_, i=i: ran.update({i: ran.get(i, 0) + 1}))
    with fastcache.enable(model, toys.config("taylor_seer", clock)) as cache:
        toys.run(cache, model, calls, clock)
        reused = cache.stats.reused
    assert reused and ran[0] == 20 and ran[1] == 10 - reused
