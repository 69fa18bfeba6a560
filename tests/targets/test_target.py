# SPDX-License-Identifier: Apache-2.0
"""A target of a user's own: the whole output of the model, kept against its input latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

import fastcache
from fastcache import BoundTarget, Interval, Mask, Recipe, Reuse, Stack, Target, Taylor
from fastcache.models.block_io import model_input
from fastcache.policies import REUSE
from fastcache.storage.unit import Unit
from fastcache.targets.base import Binding
from fastcache.targets.outputs import first_tensor

MASK = (1, 0, 0, 1, 1, 0, 1, 0, 0, 1)


@dataclass(frozen=True)
class Output(Target):
    """The whole output of a model, less its input latents."""

    scope = "all of it"
    excludes = dict.fromkeys(("all of it", "stack", "modules"), "an Output leaves nothing to skip")


class OutputTarget(BoundTarget):
    wraps = True

    def __init__(self, binding: Binding, where: Output) -> None:
        super().__init__(binding.part)
        self.make_store, self.uninstalled = binding.make_store, False

    def hooked(self) -> list[str]:
        return ["the model's output"]

    def remove(self) -> None:
        self.uninstalled = True

    def around(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        control, state = self.control, self.control.state
        x, traced = model_input(args, kwargs), torch.compiler.is_compiling()
        units = state.units[self.rule]
        if control.actions[self.rule] == REUSE:
            return units[0].streams[0].predict(x, () if traced else control.weights[self.rule])
        output = run(*args, **kwargs)
        y = first_tensor(output).detach()
        if not units:
            unit = units[0] = Unit()
            unit.streams = [self.make_store(y, state.timelines[self.rule])]
        units[0].streams[0].store(y, x.detach(), 0 if traced else state.armed_step)
        units[0].touched = True
        return output


@pytest.fixture(autouse=True)
def registered() -> None:
    fastcache.register_target("all of it", OutputTarget)


def expected(calls: list[dict[str, Any]], weigh: Callable, mask: tuple[int, ...] = MASK) -> list:
    """What comes out where the mask computes, and what is predicted from that elsewhere."""
    model, found, kept = toys.model(), [], []
    for step, call in enumerate(calls):
        if mask[step]:
            found.append(toys.step(model, call))
            kept.insert(0, (step, found[-1] - call["hidden_states"]))
            continue
        held = kept[: weigh.__self__.depth]
        weights = weigh(tuple(s for s, _ in held), step)
        residual = sum(w * r for w, (_, r) in zip(weights, held, strict=False))
        found.append(call["hidden_states"] + residual)
    return found


def close(outputs: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(outputs, wanted, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"step {i}: {m}")


def ways() -> dict[str, Callable[[Any], Any]]:
    return {
        "eager": lambda model: model,
        "fastcache.compile": lambda model: fastcache.compile(model, backend="aot_eager"),
        "torch.compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    }


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("what", [Reuse(), Taylor(1)], ids=["reuse", "taylor"])
def test_the_whole_output_is_predicted_from_its_history(way, what):
    model, calls = toys.model(), toys.inputs()
    recipe = Recipe(Mask(MASK, warmup=0, last=False), what, Output())
    with fastcache.enable(model, recipe) as cache:
        driven = ways()[way](model)
        outputs = []
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i, num_inference_steps=len(calls)):
                outputs.append(toys.step(driven, call))
        assert toys.actions(cache) == "".join("C" if m else "." for m in MASK)
    close(outputs, expected(calls, what.weights))


def test_its_storage_is_counted_emptied_and_used_again():
    model, calls = toys.model(), toys.inputs()
    with fastcache.enable(model, Recipe(Interval(2), Reuse(), Output())) as cache:
        first = toys.run(cache, model, calls)
        (state,) = cache.denoisers[0].pool.states.values()
        assert state.nbytes() == calls[0]["hidden_states"].nbytes
        before = state.units[0][0].streams[0].buffer.data_ptr()
        cache.reset()
        assert all(map(torch.equal, first, toys.run(cache, model, calls)))
        (state,) = cache.denoisers[0].pool.states.values()
        assert state.units[0][0].streams[0].buffer.data_ptr() == before


def test_it_stands_inside_the_guidance_half():
    """Guidance decides first and hands on one half; the output target sees the latents of that half."""
    model, calls = toys.model(), toys.inputs(batch=4)
    seen: list[int] = []
    whole = Recipe.of(
        [
            *Recipe(Mask((1, 0) * 5), Reuse(), fastcache.Guidance(tensor_format="BSC", grid=(2, 3))).rules,
            *Recipe(Interval(1), Reuse(), Output()).rules,
        ]
    )  # fmt: skip
    with fastcache.enable(model, whole) as cache:
        target = cache.denoisers[0].targets[1]
        around = target.around
        target.around = lambda run, /, *a, **k: (
            seen.append(model_input(a, k).shape[0]) or around(run, *a, **k)
        )
        toys.run(cache, model, calls)
    assert seen[:4] == [4, 2, 4, 2]


def test_removing_the_cache_removes_it():
    model = toys.model()
    cache = fastcache.enable(model, Recipe(Interval(2), Reuse(), Output()))
    (target,) = cache.denoisers[0].targets
    cache.disable()
    assert target.uninstalled


def test_what_makes_no_sense_together_is_refused_with_its_reason():
    one, other = Recipe(Interval(2), Reuse(), Output()), Recipe(Interval(2), Reuse(), Stack())
    for first, second in ((one, other), (other, one), (one, one)):
        with pytest.raises(ValueError, match="an Output leaves nothing to skip"):
            first + second


def test_a_description_that_nobody_binds_is_refused_and_leaves_the_model_alone():
    @dataclass(frozen=True)
    class Nowhere(Target):
        scope = "nowhere"

    model = toys.model()
    with pytest.raises(
        ValueError, match=r"scope 'nowhere', and nothing binds that.*register_target"
    ):
        fastcache.enable(model, Recipe(Interval(2), Reuse(), Nowhere()))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    "scope, bind, error, said",
    [
        ("stack", OutputTarget, ValueError, "which is taken"),
        (3, OutputTarget, TypeError, "must be a string"),
        ("mine", None, TypeError, "must be a string and a function"),
    ],
)
def test_registering_is_checked(scope, bind, error, said):
    with pytest.raises(error, match=said):
        fastcache.register_target(scope, bind)
