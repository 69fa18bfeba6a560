# SPDX-License-Identifier: Apache-2.0
"""Output(): the whole model is skipped, and what it returned before stands in, in the form in which it comes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache import (
    DMD,
    Extrapolate,
    FirstBlock,
    Guided,
    Hermite,
    Interval,
    Magnitude,
    Mask,
    Modules,
    Output,
    Recipe,
    Reuse,
    Stack,
    Taylor,
    TaylorTable,
    Zeros,
)
from fastcache.policies import Calibrate, Decision, Policy
from fastcache.signals import Signal

MASK = (1, 1, 0, 0, 1, 0, 1, 1, 0, 1)
MARKS = "".join("C" if m else "." for m in MASK)


@dataclass
class Plain:
    """A dataclass that torch knows nothing of."""

    sample: Tensor
    note: str = "kept"


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    torch._dynamo.reset()


class Forms(toys.Model):
    """A toy whose output is wrapped by a function, and whose latents may be one tensor per sample."""

    def __init__(self, wrap: Callable[[Tensor], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.wrap = wrap

    def forward(self, hidden_states: Any, timestep: Any = None, return_dict: bool = True) -> Any:
        apart = isinstance(hidden_states, list)
        out = super().forward(torch.stack(hidden_states) if apart else hidden_states, timestep)
        found = self.wrap(list(out.unbind(0)) if apart else out)
        return found if return_dict else (out,)


FORMS: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y,),
    "list": lambda y: [y],
    "tuple with more": lambda y: (y, None, y.mean(-1), 3),
    "dataclass": Plain,
    "dict": lambda y: {"sample": y},
    "other shape": lambda y: y[..., :2],
    "integers": lambda y: (y, (y > 0).long()),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model,
    "fastcache.compile": lambda model: fastcache.compile(model, backend="aot_eager"),
    "torch.compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
}


def leaves(output: Any) -> list[Any]:
    """What an output holds, with the names and the kinds of what holds it."""
    if isinstance(output, Plain):
        return [Plain, output.sample, output.note]
    if isinstance(output, dict):
        return [type(output), *(v for item in output.items() for v in item)]
    if isinstance(output, list | tuple):
        return [type(output), *(leaf for v in output for leaf in leaves(v))]
    return [output]


def expected(outputs: list[Any], latents: list[list[Tensor]], what: Any, mask: Any = MASK) -> list:
    """Per step the leaves, predicted from what was computed: differences from latents where shapes agree."""
    kept: list[tuple[int, list[Any]]] = []
    found = []
    for step, (output, given) in enumerate(zip(outputs, latents, strict=True)):
        own, xs, whole = leaves(output), iter(given), []
        for leaf in own:
            x = next(xs, None) if isinstance(leaf, Tensor) else None
            agrees = x is not None and leaf.shape == x.shape and leaf.is_floating_point()
            whole.append((leaf, x if agrees else None))
        if mask[step]:
            kept.insert(0, (step, [v if x is None else v - x for v, x in whole]))
            found.append(own)
            continue
        held = kept[: what.depth]
        weights = what.weights(tuple(s for s, _ in held), step)
        predicted = []
        for i, (leaf, x) in enumerate(whole):
            if not isinstance(leaf, Tensor):
                predicted.append(leaf)
                continue
            terms = zip(weights, held, strict=False)
            total = sum(w * values[i].float() for w, (_, values) in terms)
            predicted.append((total if x is None else x + total).to(leaf.dtype))
        found.append(predicted)
    return found


def close(found: list[Any], wanted: list[Any]) -> None:
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        for one, other in zip(leaves(a), b, strict=True):
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=f"step {step}")
            else:
                assert one == other


def recipe(what: Any = None, mask: Any = MASK) -> Recipe:
    return Recipe(Mask(mask, warmup=0, last=False), what or Reuse(), Output())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", [Reuse(), Taylor(1)], ids=["reuse", "taylor"])
def test_what_a_model_returns_is_rebuilt_in_its_form(form, what, way):
    if form == "integers" and what.depth > 1:
        pytest.skip("a line through integers is rounded in another way by each kernel")
    model, calls = Forms(FORMS[form]), toys.inputs()
    latents = [[call["hidden_states"]] for call in calls]
    wanted = expected(toys.plain(model, calls), latents, what)
    with fastcache.enable(model, recipe(what)) as cache:
        found = driven(cache, WAYS[way](model), calls)
        assert toys.actions(cache) == MARKS
    close(found, wanted)


def driven(cache: fastcache.Cache, model: Any, calls: list[dict], **more: Any) -> list[Any]:
    found = []
    for i, call in enumerate(calls):
        with cache.context("cond", step_index=i, num_inference_steps=len(calls)), torch.no_grad():
            found.append(model(**call, **more))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_samples_may_come_and_go_as_a_list(way):
    model, calls = Forms(lambda y: (y, {})), toys.inputs()
    for call in calls:
        call["hidden_states"] = list(call["hidden_states"].unbind(0))
    wanted = expected(toys.plain(model, calls), [c["hidden_states"] for c in calls], Taylor(1))
    with fastcache.enable(model, recipe(Taylor(1))) as cache:
        close(driven(cache, WAYS[way](model), calls), wanted)
        assert toys.actions(cache) == MARKS


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_the_model_runs_in_a_reused_step(way):
    model, calls = toys.model(), toys.inputs()
    computed = []
    if way != "torch.compile":  # whose graphs hold no hook that counts
        for module in model.modules():
            if module is not model:
                module.register_forward_hook(lambda *_: computed.append(1))
    with fastcache.enable(model, recipe()) as cache:
        target = WAYS[way](model)
        for i, call in enumerate(calls):
            before = len(computed)
            with cache.context("cond", step_index=i, num_inference_steps=len(calls)):
                if not MASK[i] and way != "eager":
                    nn.init.constant_(model.embed.weight, math.nan)  # a graph that reads it shows
                with torch.no_grad():
                    output = target(**call)
            assert output.isfinite().all() or MASK[i]
            if not MASK[i]:
                assert len(computed) == before
                model.load_state_dict(toys.model().state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_another_run_may_ask_for_another_form(way):
    """The storage of a run serves the next one; the form in which that is to be returned does not."""
    model, calls = Forms(lambda y: {"sample": y}), toys.inputs()
    with fastcache.enable(model, recipe()) as cache:
        target = WAYS[way](model)
        for return_dict in (True, False, True):
            for output in driven(cache, target, calls, return_dict=return_dict):
                assert isinstance(output, dict if return_dict else tuple)
            cache.reset()


class WritesLatents(toys.Model):
    def forward(self, hidden_states: Tensor, timestep: Any = None) -> Tensor:
        out = super().forward(hidden_states, timestep)
        hidden_states.mul_(2)
        return out


@pytest.mark.parametrize("way", ["eager", "fastcache.compile"])
def test_latents_that_the_model_writes_into_are_taken_as_they_came(way):
    model, calls = WritesLatents(), toys.inputs()
    latents = [[call["hidden_states"]] for call in calls]
    wanted = expected(toys.plain(model, calls), latents, Taylor(1))
    with fastcache.enable(model, recipe(Taylor(1))) as cache:
        target = WAYS[way](model)
        found = []
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i, num_inference_steps=len(calls)):
                found.append(toys.step(target, call))
    close(found, wanted)


def test_what_was_returned_stays_as_it_is():
    model, calls = Forms(FORMS["other shape"]), toys.inputs()
    with fastcache.enable(model, recipe()) as cache:
        found, copies = [], []
        for call in calls:
            found += toys.run(cache, model, [call])
            copies.append(found[-1].clone())
        assert all(map(torch.equal, found, copies))
        found[2].fill_(math.nan)  # a caller's own from now on
        assert not toys.run(cache, model, calls)[2].isnan().any()


class Steady(Policy):
    """Reuses while the latents have moved little."""

    threshold = 0.2
    signal = Signal("model_input", against="last_computed")

    def _judge(self, run, step, signal, guard):
        reuse = not guard and signal is not None and signal <= self.threshold
        return Decision("reuse" if reuse else "compute", signal, self.threshold, guard or "moved")


@pytest.mark.parametrize("way", ["eager", "fastcache.compile"])
@pytest.mark.parametrize(
    "when",
    [
        Interval(3),
        Magnitude(0.3, mag_ratios=tuple(toys.RATIOS), num_inference_steps=toys.STEPS),
        Steady(),
    ],
    ids=lambda when: type(when).__name__,
)
def test_policies_that_need_no_first_block_drive_it(when, way):
    model, calls = toys.model(), toys.inputs()
    with fastcache.enable(model, Recipe(when, Reuse(), Output())) as cache:
        found = driven(cache, WAYS[way](model), calls)
        marks = toys.actions(cache)
        assert {"C", "."} == set(marks)
    latents = [[call["hidden_states"]] for call in calls]
    mask = [mark == "C" for mark in marks]
    close(found, expected(toys.plain(model, calls), latents, Reuse(), mask))


@pytest.mark.parametrize(
    "what, same",
    [(Taylor(2), Taylor(2)), (Hermite(2), Hermite(2)), (TaylorTable(1), Taylor(1))],
    ids=["taylor", "hermite", "table"],
)
def test_every_predictor_that_sums_a_history_serves(what, same):
    model, calls = toys.model(), toys.inputs()
    plain, latents = toys.plain(model, calls), [[call["hidden_states"]] for call in calls]
    with fastcache.enable(model, recipe(what)) as cache:
        close(toys.run(cache, model, calls), expected(plain, latents, same))
        assert toys.actions(cache) == MARKS


class Decays(nn.Module):
    """Adds to the latents a constant and two exponentials of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Parameter(torch.randn(3, 6, 4), requires_grad=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        a, b, c = self.parts
        return hidden_states + a + b * 0.9**timestep + c * 0.6**timestep


def test_exponentials_are_fitted_to_the_differences():
    model, calls = Decays(), toys.inputs(6)
    for i, call in enumerate(calls):
        call["timestep"] = torch.tensor(float(i))
    with fastcache.enable(model, recipe(DMD(), (1, 1, 1, 1, 0, 0))) as cache:
        found = driven(cache, model, calls)
        assert toys.actions(cache) == "CCCC.."
    for a, b in zip(found, toys.plain(model, calls), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "when, what, said",
    [
        (FirstBlock(0.1), Reuse(), "decides after the first block has run"),
        (Interval(2), Zeros(), "would drop the image"),
        (Interval(2), Extrapolate(), "rule for attention"),
        (Interval(2), Guided(1), "an Output runs none"),
        (Calibrate(), Reuse(), "measures the residual of a Stack"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(when, what, said):
    with pytest.raises(ValueError, match=said):
        Recipe(when, what, Output())


@pytest.mark.parametrize("other", [Output(), Stack(), Modules()])
def test_nothing_is_left_to_skip_beside_it(other):
    one = Recipe(Interval(2), Reuse(), Output())
    for pair in (
        (one, Recipe(Interval(2), Reuse(), other)),
        (Recipe(Interval(2), Reuse(), other), one),
    ):
        with pytest.raises(ValueError, match="an Output skips the whole model"):
            pair[0] + pair[1]


def test_a_model_that_returns_no_tensor_says_so():
    model = Forms(lambda y: None)
    with fastcache.enable(model, recipe()):
        with pytest.raises(ValueError, match="found no tensor"):
            toys.step(model, toys.inputs()[0])


@pytest.mark.parametrize("limit", [None, 1.5, 0.5])
def test_requests_and_branches_share_nothing_and_the_budget_holds(limit):
    model = toys.model()
    calls = {key: toys.inputs(seed=key) for key in (1, 2)}
    one = calls[1][0]["hidden_states"].nbytes
    alone = {}
    for key, run in calls.items():
        latents = [[call["hidden_states"]] for call in run]
        alone[key] = expected(toys.plain(model, run), latents, Reuse())
    plain = {key: toys.plain(model, run) for key, run in calls.items()}
    cache = fastcache.enable(
        model,
        fastcache.Recipe(Mask(MASK, warmup=0, last=False), Reuse(), Output()),
        max_bytes=None if limit is None else int(limit * one),
    )
    found: dict[int, list] = {1: [], 2: []}
    with cache:
        for i in range(toys.STEPS):
            for key in found:
                with cache.context("cond", request=key):
                    found[key].append(toys.step(model, calls[key][i]))
        if limit is None:
            assert toys.actions(cache) == "".join(m * 2 for m in MARKS)
        else:
            assert sum(s.nbytes() for s in cache.denoisers[0].pool.states.values()) <= limit * one
    for key in found:
        if limit is None:
            close(found[key], alone[key])
        elif limit < 1:  # not even one fits
            assert all(map(torch.equal, found[key], plain[key]))


def test_a_full_batch_waits_for_both_halves_after_steps_of_one():
    model, calls = toys.model(), toys.inputs(batch=4)
    full = (
        1,
        1,
        0,
        0,
        1,
        1,
        1,
        1,
        1,
        1,
    )  # of the guidance batch: the others see its conditional half
    rules = [
        *Recipe(Mask(full), Reuse(), fastcache.Guidance(tensor_format="BSC", grid=(2, 3))).rules,
        *Recipe(Mask((1, 0, 1, 0, 0, 0, 1, 0, 1, 1)), Reuse(), Output()).rules,
    ]
    with fastcache.enable(model, Recipe.of(rules)) as cache:
        found = toys.run(cache, model, calls)
        seen = [r.actions for r in cache.stats]
    plain = toys.plain(model, calls)
    assert [a[1] for a in seen] == [
        "compute", "reuse", "compute", "reuse", "compute",
        "reuse", "compute", "reuse", "compute", "compute",
    ]  # fmt: skip
    # step 3 forecasts the conditional half from the half that step 2 computed
    half = calls[3]["hidden_states"][2:] + (plain[2] - calls[2]["hidden_states"])[2:]
    torch.testing.assert_close(found[3][2:], half, rtol=1e-5, atol=1e-5)
    # step 4 was to reuse a full batch, whose other half step 2 has not seen
    torch.testing.assert_close(found[4], plain[4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("way", ["eager", "fastcache.compile"])
@pytest.mark.parametrize("name", ["Flux", "QwenImage", "CogVideoX"])
def test_models_of_diffusers_get_back_what_they_return(name, way, return_dict):
    pytest.importorskip("diffusers")
    model, inputs = tiny.build(name, depth=1)
    calls = tiny.trajectory(name, inputs, len(MASK))
    with torch.no_grad():
        outputs = [model(**call, return_dict=return_dict) for call in calls]
    latents = [[call["hidden_states"]] for call in calls]
    with fastcache.enable(model, recipe(Taylor(1))) as cache:
        found = driven(cache, WAYS[way](model), calls, return_dict=return_dict)
        assert toys.actions(cache) == MARKS
    assert all(type(a) is type(b) for a, b in zip(found, outputs, strict=True))
    close(found, expected(outputs, latents, Taylor(1)))


def test_lists_of_samples_as_z_image_has_them():
    pytest.importorskip("diffusers")
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=8, axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
    ).eval()  # fmt: skip
    g = torch.Generator().manual_seed(0)
    start, end = (torch.randn(2, 4, 1, 4, 4, generator=g) for _ in range(2))
    words = [torch.randn(5, 8, generator=g) for _ in range(2)]
    calls = [
        {
            "x": list((math.cos(0.05 * i) * start + math.sin(0.05 * i) * end).unbind(0)),
            "t": torch.full((2,), i / len(MASK)),
            "cap_feats": words,
            "return_dict": False,
        }
        for i in range(len(MASK))
    ]
    with torch.no_grad():
        outputs = [model(**call) for call in calls]
    with fastcache.enable(model, recipe()) as cache:
        found = driven(cache, model, calls)
        assert toys.actions(cache) == MARKS
    close(found, expected(outputs, [call["x"] for call in calls], Reuse()))
