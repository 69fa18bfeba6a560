# SPDX-License-Identifier: Apache-2.0
"""Signals and what measures them: decided by the model's input before anything runs, or by its first block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import toys
from modulated import ADAPTER, WAYS, ModulatedModel
from torch import Tensor, nn

import fastcache
from fastcache import Decision, Guidance, Modules, Policy, Recipe, Reuse, Stack, Taylor, sync
from fastcache.graphs import compiled
from fastcache.models.block_io import model_input
from fastcache.policies import COMPUTE, REUSE
from fastcache.signals import Signal

STEPS = 12


@pytest.fixture(autouse=True)
def graphs_of_its_own() -> Iterator[None]:
    """Torch counts what is compiled of one function over a whole process."""
    yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class Latents(Policy):
    """Reuse while the input latents have changed little since the last computed step."""

    threshold: float = 0.2
    per_sample: bool = False
    signal = Signal("model_input", "last_computed")
    weighs = "change"

    def _judge(self, run, step, signal, guard):
        if guard or signal is None:
            return Decision(COMPUTE, signal, self.threshold, guard or "no latents yet")
        small = math.isfinite(signal) and signal <= self.threshold
        return Decision(REUSE if small else COMPUTE, signal, self.threshold, "change")


@dataclass(frozen=True)
class Steps(Latents):
    """The same against the step before, whatever became of it."""

    signal = Signal("model_input", "previous")


@dataclass(frozen=True)
class FirstBlockSteps(Latents):
    """The residual of the first block against that of the step before."""

    signal = Signal("first_block", "previous")


def change(now: Tensor, before: Tensor) -> float:
    """The largest relative L1 change over samples, each row one."""
    difference = (now.double() - before.double()).abs().flatten(1).sum(1)
    return float((difference / before.double().abs().flatten(1).sum(1)).max())


def simulated(latents: list[Tensor], policy: Latents) -> tuple[str, list[float | None]]:
    """Actions and signals of a run, from its latents alone."""
    actions, signals, before = "", [], None
    for now in latents:
        rows = now if policy.per_sample else now[None]
        seen = None if before is None else change(rows, before)
        reuse = seen is not None and seen <= policy.threshold
        actions, signals = actions + ("." if reuse else "C"), [*signals, seen]
        if not reuse or policy.signal.against == "previous":
            before = rows
    return actions, signals


def calls_of(seed: int = 0, batch: int = 2) -> list[dict[str, Any]]:
    calls = toys.inputs(STEPS, seed, batch=batch)
    calls[5]["hidden_states"][0] *= 1.5  # one sample jumps
    return calls


def run(model: nn.Module, recipe: Recipe, calls: list[dict], way: str = "eager") -> tuple[Any, ...]:
    with fastcache.enable(model, recipe) as cache:
        outputs = toys.run(cache, WAYS[way](model), calls)
        return outputs, toys.actions(cache), [r.signal for r in cache.stats]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "policy",
    [Latents(), Latents(per_sample=True), Steps(0.12), Steps(0.17, per_sample=True)],
    ids=["last computed", "per sample", "previous", "previous, per sample"],
)
@pytest.mark.parametrize(
    "what, where",
    [(Reuse(), Stack()), (Taylor(1), Stack()), (Taylor(1), Modules((r"\.attn$",)))],
    ids=["stack", "forecast", "modules"],
)
def test_the_latents_decide_and_the_step_is_that_of_a_mask(policy, what, where, way):
    """Actions and numbers follow from the latents; outputs are those of the same actions, given beforehand."""
    calls = calls_of()
    policy = replace(policy, warmup=0, last=False)
    actions, signals = simulated([call["hidden_states"] for call in calls], policy)
    assert 2 < actions.count("C") < STEPS - 2
    outputs, taken, seen = run(toys.model(), Recipe(policy, what, where), calls, way)
    assert taken == actions
    assert seen[0] is None and seen[1:] == pytest.approx(signals[1:], rel=1e-4)
    mask = fastcache.Mask(tuple(a == "C" for a in actions), warmup=0, last=False)
    wanted, _, _ = run(toys.model(), Recipe(mask, what, where), calls, way)
    assert all(map(torch.equal, outputs, wanted))


def test_nothing_of_the_model_runs_before_the_decision():
    """On a reused step the embedding runs once and no block does, also the first one."""
    model, ran = toys.model(), []
    for name, module in (("embed", model.embed), ("first", model.blocks[0])):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    _, actions, _ = run(model, Recipe(Latents()), calls_of())
    assert ran.count("embed") == STEPS and ran.count("first") == actions.count("C")


def test_a_compiled_model_has_two_programs_and_none_later():
    made: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        made.append(len(made))
        return graph.forward

    model, calls = toys.model(), calls_of()
    with fastcache.enable(model, Recipe(Latents())) as cache:
        compiled = fastcache.compile(model, backend=backend)
        for seed in range(3):
            toys.run(cache, compiled, calls_of(seed), request=seed)
            assert len(made) == 2
            cache.reset()
    assert calls


def test_torch_compile_says_what_to_do():
    model = toys.model()
    with fastcache.enable(model, Recipe(Latents())) as cache:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with pytest.raises(
            Exception, match=r"decides by what the model is called with.*fastcache\.compile"
        ):
            toys.run(cache, compiled, calls_of())


def test_the_guidance_half_can_be_skipped_by_the_latents():
    calls = calls_of(batch=4)
    where = Guidance(tensor_format="BSC", grid=(2, 3))
    actions, _ = simulated([call["hidden_states"] for call in calls], Latents())
    outputs, taken, _ = run(toys.model(), Recipe(Latents(), Reuse(), where), calls)
    assert taken == actions
    mask = fastcache.Mask(tuple(a == "C" for a in actions), warmup=0, last=False)
    wanted, _, _ = run(toys.model(), Recipe(mask, Reuse(), where), calls)
    assert all(map(torch.equal, outputs, wanted))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_latents_that_are_no_numbers_compute(bad):
    calls = calls_of()
    calls[4]["hidden_states"][0, 0, 0] = bad
    _, actions, _ = run(toys.model(), Recipe(Latents(10.0)), calls)
    assert actions[:4] == "C..." and actions[4] == "C" and actions[5] == "C"
    assert actions[6:] == "." * (STEPS - 6)


def test_one_number_is_read_per_step(monkeypatch):
    read: list[Tensor] = []
    whole = sync.relative_change
    monkeypatch.setattr(sync, "relative_change", lambda *a: read.append(a[0]) or whole(*a))
    run(toys.model(), Recipe(Latents()), calls_of())
    assert [tuple(sums.shape) for sums in read] == [(2,)] * (STEPS - 1)


def test_latents_are_kept_as_they_came():
    """A model that writes into its input, and a caller that reuses one tensor for all steps, change nothing."""

    class Writes(toys.Model):
        def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
            output = super().forward(hidden_states, timestep, encoder_hidden_states)
            hidden_states.zero_()
            return output

    calls = calls_of()
    actions, _ = simulated([call["hidden_states"] for call in calls], Latents())
    model, held = Writes(), torch.empty_like(calls[0]["hidden_states"])
    with fastcache.enable(model, Recipe(Latents())) as cache, torch.no_grad():
        for call in calls:
            with cache.context("cond"):
                model(held.copy_(call["hidden_states"]), call["timestep"])
        assert toys.actions(cache) == actions


def test_what_is_kept_is_counted_emptied_and_stays_in_place():
    model, calls = toys.model(), calls_of()
    with fastcache.enable(model, Recipe(Latents())) as cache:
        first = toys.run(cache, model, calls)
        pool = cache.denoisers[0].pool
        (state,) = pool.states.values()
        signal = state.slots[0].signal
        row = calls[0]["hidden_states"].nbytes
        hidden = row // 4 * toys.DIM
        assert state.nbytes() == 2 * row + hidden
        before = [t.data_ptr() for t in state.tensors()]
        cache.reset()
        assert not signal.kept_reference and not any(t.any() for t in pool.spares[0].tensors())
        assert all(map(torch.equal, first, toys.run(cache, model, calls)))
        (state,) = pool.states.values()
        assert [t.data_ptr() for t in state.tensors()] == before


def test_runs_that_take_turns_on_little_memory_decide_as_if_they_were_alone():
    model, runs = toys.model(), [calls_of(seed) for seed in range(3)]
    alone = [run(toys.model(), Recipe(Latents()), calls)[:2] for calls in runs]
    row = runs[0][0]["hidden_states"].nbytes
    budget = (2 * row + row // 4 * toys.DIM) * 2
    outputs: list[list[Tensor]] = [[] for _ in runs]
    with fastcache.enable(model, Recipe(Latents()), max_bytes=budget, offload=True) as cache:
        for i in range(STEPS):
            for request, calls in enumerate(runs):
                with cache.context("cond", request=request, step_index=i):
                    outputs[request].append(toys.step(model, calls[i]))
        for request, (wanted, actions) in enumerate(alone):
            taken = [r.action for r in cache.stats if r.request == request]
            assert "".join("C" if a == COMPUTE else "." for a in taken) == actions
            assert all(map(torch.equal, outputs[request], wanted))


def test_no_room_for_the_latents_computes(monkeypatch):
    from fastcache.storage.allocate import NoRoom
    from fastcache.targets.meters import change as meter

    def full(*_: Any) -> Any:
        raise NoRoom("no memory")

    monkeypatch.setattr(meter, "allocate", full)
    _, actions, _ = run(toys.model(), Recipe(Latents()), calls_of())
    assert actions == "C" * STEPS


class Listed(nn.Module):
    """Takes its latents as a list, one tensor per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.model()

    def forward(self, x, timestep=None):
        return self.inner(torch.stack(list(x)), timestep)


@pytest.mark.parametrize("per_sample", [False, True])
def test_latents_may_come_as_a_list(per_sample):
    calls = calls_of()
    policy = Latents(per_sample=per_sample)
    actions, _ = simulated([call["hidden_states"] for call in calls], policy)
    model = Listed().eval()
    adapter = fastcache.BlockAdapter(blocks=("inner.blocks",))
    with fastcache.enable(model, Recipe(policy), adapter=adapter) as cache, torch.no_grad():
        for call in calls:
            model(list(call["hidden_states"]), call["timestep"])
        assert toys.actions(cache) == actions


@pytest.mark.parametrize("name", ["hidden_states", "x", "img", "vision_tokens"])
def test_latents_are_known_by_their_name_wherever_they_come(name):
    latents = torch.ones(2, 3)
    assert model_input((), {"timestep": torch.ones(2), name: latents}) is latents
    assert model_input((torch.zeros(2, dtype=torch.long),), {name: latents}) is latents


def test_a_call_without_latents_says_what_is_missing():
    model = Listed().eval()
    adapter = fastcache.BlockAdapter(blocks=("inner.blocks",))
    for first, found in (("no latents", "a str"), (torch.ones(2, 3).long(), r"of torch\.int64")):
        said = pytest.raises(ValueError, match=f"Latents looks at the latents .* that is {found}")
        with fastcache.enable(model, Recipe(Latents()), adapter=adapter), said:
            model(first, 1.0)


def test_a_signal_that_nothing_measures_is_refused_and_leaves_the_model_alone():
    @dataclass(frozen=True)
    class Unmeasured(Latents):
        signal = Signal("model_input", measure="misfit")

    model = toys.model()
    with pytest.raises(ValueError, match="misfit"):
        fastcache.enable(model, Recipe(Unmeasured(), fastcache.Guided(1)))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("way", WAYS)
def test_the_first_block_may_be_held_against_the_step_before(way):
    calls, model = calls_of(), toys.model()
    residuals: list[Tensor] = []
    with torch.no_grad():
        model.blocks[0].register_forward_hook(
            lambda _, args, kwargs, out: residuals.append(out - kwargs["hidden_states"]),
            with_kwargs=True,
        )
        toys.plain(model, calls)
    policy = FirstBlockSteps(0.1)
    actions, signals = simulated(residuals, policy)
    assert 2 < actions.count("C") < STEPS - 1
    _, taken, seen = run(toys.model(), Recipe(policy), calls, way)
    assert taken == actions and seen[1:] == pytest.approx(signals[1:], rel=1e-3)


def test_a_plan_and_an_export_need_what_only_the_run_shows():
    with pytest.raises(ValueError, match="Latents decides on data of the run"):
        Recipe(Latents()).plan(STEPS)
    model, calls = toys.model(), calls_of()
    said = pytest.raises(ValueError, match="one rule that decides beforehand")
    with fastcache.enable(model, Recipe(Latents())), said:
        fastcache.export_variants(model, (), calls[0])


# --- what enters the first block --------------------------------------------------------------------------


@dataclass(frozen=True)
class Modulated(Latents):
    """Reuse while the first block's modulated input has changed little since the last computed step."""

    signal = Signal("block_input", "last_computed")


@dataclass(frozen=True)
class ModulatedSteps(Latents):
    """The same against the step before."""

    signal = Signal("block_input", "previous")


def run_modulated(model: nn.Module, recipe: Recipe, calls: list, way: str = "eager") -> tuple:
    with fastcache.enable(model, recipe, adapter=ADAPTER) as cache:
        outputs = toys.run(cache, WAYS[way](model), calls)
        return outputs, toys.actions(cache), [r.signal for r in cache.stats]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", [Reuse(), Taylor(1)], ids=["reuse", "taylor"])
@pytest.mark.parametrize("walk", ["iterate", "index", "listed", "zip"])
@pytest.mark.parametrize("policy", [Modulated(0.3), ModulatedSteps(0.2)], ids=["last", "previous"])
def test_the_modulated_input_decides_before_any_block(policy, walk, what, way):
    calls, model, seen = calls_of(), ModulatedModel(walk), []
    model.blocks[0].norm.register_forward_hook(lambda _, args, out: seen.append(out))
    toys.plain(model, calls)
    policy = replace(policy, warmup=0, last=False)
    actions, signals = simulated(seen, policy)
    assert 2 < actions.count("C") < STEPS - 2
    model, ran = ModulatedModel(walk), []
    if way == "eager":
        model.blocks[0].register_forward_hook(lambda *_: ran.append(0))
    outputs, taken, numbers = run_modulated(model, Recipe(policy, what), calls, way)
    assert taken == actions and numbers[1:] == pytest.approx(signals[1:], rel=1e-3)
    assert len(ran) == (actions.count("C") if way == "eager" else 0)
    mask = fastcache.Mask(tuple(a == "C" for a in actions), warmup=0, last=False)
    wanted, _, _ = run_modulated(ModulatedModel(walk), Recipe(mask, what), calls, way)
    for a, b in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_steps_whose_first_part_alone_is_compiled_are_stored_too():
    """As with cudagraphs="reuse": what computes all blocks is the model's own forward."""
    calls, policy = calls_of(), Modulated(0.3, warmup=0, last=False)
    wanted, actions, _ = run_modulated(ModulatedModel(), Recipe(policy), calls)
    assert "." in actions
    model = ModulatedModel()
    with fastcache.enable(model, Recipe(policy), adapter=ADAPTER) as cache:
        driven = fastcache.compile(model, backend="aot_eager")
        driven._compiles = compiled.COMPILED["reuse"]
        outputs = toys.run(cache, driven, calls)
        assert toys.actions(cache) == actions
    for a, b in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_block_whose_modulation_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"Modulated needs the normalisation.*fastcache\.Block"):
        fastcache.enable(toys.model(), Recipe(Modulated()))


def test_what_cannot_decide_by_the_first_blocks_input_is_refused():
    with pytest.raises(ValueError, match="its target is Stack"):
        Recipe(Modulated(), Reuse(), Modules())
    with pytest.raises(ValueError, match="guide='residual' needs it on every step"):
        Recipe(Modulated(), fastcache.Guided(1))
