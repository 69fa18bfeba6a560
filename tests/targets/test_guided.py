# SPDX-License-Identifier: Apache-2.0
"""Guided prediction: weights read off this step's first block, without asking the host."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch
import toys
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache
from fastcache import FirstBlock, Guided, Interval, Mask, Misfit, Recipe, Reuse, Taylor
from fastcache.models.block_io import BlockIO

demo = pytest.importorskip("fastcache.demo.sample")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("order", 4),
        ("guide", "output"),
        ("ridge", -1.0),
        ("tokens", 0),
        ("max_misfit", float("nan")),
        ("prior", 3),
        ("early", 1),
    ],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=field):
        Guided(**{field: value})


@pytest.mark.parametrize("steps", [(4, 3, 2, 1), (9, 5, 3, 2), (20, 12, 11, 1), (6, 3, 1, 0)])
@pytest.mark.parametrize(("order", "prior"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_the_prior_is_a_taylor_forecast_by_differences(steps, order, prior) -> None:
    like = Taylor(min(order, prior), "exact", skip_first=prior == 2)
    values = [7.0, 2.0, -1.5, 4.0]
    differences = [a - b for a, b in pairwise(values)]
    for step in (steps[0] + 1, steps[0] + 4):
        want = sum(
            w * v for w, v in zip(like.weights(steps[: like.depth], step), values, strict=False)
        )
        found = Guided(order, prior=prior).weights(steps[: order + 1], step)
        assert len(found) == order
        move = sum(w * d for w, d in zip(found, differences, strict=False))
        assert values[0] + move == pytest.approx(want, rel=1e-12)


def outputs(shipped: tuple, recipe: Recipe, steps: int) -> tuple[Tensor, list[str]]:
    model, labels = shipped
    with fastcache.enable(model, recipe) as cache:
        images = demo.generate(model, labels, steps=steps, seed=3, cache=cache)
        return images, [record.action for record in cache.stats]


@pytest.mark.parametrize("order", [2, 3])
def test_a_strong_ridge_leaves_the_forecast_of_the_prior(shipped: tuple, order: int) -> None:
    rule = Interval(3, phase=0, warmup=2)  # gaps differ: Taylor's spacing counts
    guided, actions = outputs(
        shipped, Recipe(rule, Guided(order, "modulated", 1e6, early=True, prior=2)), 14
    )
    taylor, same = outputs(shipped, Recipe(rule, Taylor(2, "exact", True)), 14)
    assert actions == same and actions[:4] == ["compute", "compute", "reuse", "compute"]
    assert torch.allclose(guided, taylor, atol=1e-3)


@pytest.mark.parametrize("guide", ["residual", "modulated"])
@pytest.mark.parametrize("order", [2, 3])
def test_an_early_forecast_is_that_of_one_difference(shipped: tuple, guide, order: int) -> None:
    rule = Mask([1, 1, 0, 0])
    # the ridge goes by the mean square of the differences, of which all but one are 0
    early, actions = outputs(
        shipped, Recipe(rule, Guided(order, guide, 0.05 * order, early=True)), 4
    )
    first, same = outputs(shipped, Recipe(rule, Guided(1, guide, 0.05)), 4)
    assert actions == same == ["compute", "compute", "reuse", "reuse"]
    assert torch.allclose(early, first, atol=1e-5)
    late, waiting = outputs(shipped, Recipe(rule, Guided(2, guide, 0.1)), 4)
    assert waiting == ["compute", "compute", "compute", "reuse"]
    assert not torch.allclose(late, first, atol=1e-3)


@pytest.mark.parametrize("order", [2, 3])
def test_an_early_forecast_is_the_same_compiled(shipped: tuple, order: int) -> None:
    model, labels = shipped
    recipe, images = Recipe(Interval(3, phase=0, warmup=2), Guided(order, "auto", early=True)), []
    for compiled in (False, True):
        with fastcache.enable(model, recipe) as cache:
            call = fastcache.compile(model, backend="eager") if compiled else model
            for _ in range(2):  # the first run fills what a compiled one needs
                images.append(demo.generate(call, labels, steps=9, seed=3, cache=cache))
            assert cache.stats.computed == 2 * len(recipe.plan(9).computed) == 10
    assert all(torch.allclose(images[0], other, atol=1e-5) for other in images[1:])


def test_a_checked_guide_of_half_a_guidance_batch_looks_at_that_half() -> None:
    """The other half of what is kept is of earlier steps, whose halves were computed together."""
    calls = toys.inputs(batch=2)
    twice = [{k: torch.cat([v, v]) if v.dim() else v for k, v in call.items()} for call in calls]
    marks, model = (1, 1, 1, 1, 0, 1, 0, 1, 0, 1), toys.model()
    stack = Recipe(Mask(marks), Guided(3, "input", 0.05, tokens=1, checked=True))
    halves = Recipe(
        Mask((1, 1, 0, 0, 0, 0, 0, 0, 0, 0)),
        Reuse(),
        fastcache.Guidance(tensor_format="BSC", grid=(2, 3)),
    )
    with fastcache.enable(model, stack) as cache:
        want = toys.run(cache, model, calls)
        actions = [record.action for record in cache.stats]
    with fastcache.enable(model, Recipe.of([*halves.rules, *stack.rules])) as cache:
        found = toys.run(cache, model, twice)
    assert "reuse" in actions
    for one, both in zip(want, found, strict=True):
        assert torch.allclose(one, both[2:], atol=1e-5)


@pytest.fixture(scope="module")
def shipped() -> tuple:
    from fastcache.demo import model as demo_model

    torch.set_num_threads(1)
    model, labels = demo_model.load_model(), torch.arange(12) % 10
    return model, labels


def psnr_of(shipped: tuple, recipe: Recipe, steps: int) -> tuple[float, int]:
    from fastcache.demo import metrics, sample

    model, labels = shipped
    reference = sample.generate(model, labels, steps=steps, seed=3)
    with fastcache.enable(model, recipe) as cache:
        images = sample.generate(model, labels, steps=steps, seed=3, cache=cache)
        return float(metrics.psnr(images, reference)), cache.stats.computed


@pytest.mark.bench
@pytest.mark.parametrize(
    ("steps", "n", "gain"), [(28, 3, 2.0), (28, 4, 2.0), (28, 5, 2.0), (50, 5, 3.0)]
)
def test_guided_beats_taylor_at_the_same_computed_steps(
    shipped: tuple, steps: int, n: int, gain: float
) -> None:
    rule = Interval(n, warmup=3, last=True)
    taylor, computed = psnr_of(shipped, Recipe(rule, Taylor(1)), steps)
    guided, same = psnr_of(shipped, Recipe(rule, Guided(2, tokens=1)), steps)
    thinned, _ = psnr_of(shipped, Recipe(rule, Guided(2)), steps)
    assert computed == same
    assert guided >= taylor + gain
    assert thinned >= guided - 0.6


def test_max_misfit_computes_more_and_shows_the_misfit(shipped: tuple) -> None:
    from fastcache.demo import sample

    model, labels = shipped
    reused = []
    for bound in (None, 0.05):
        recipe = Recipe(Interval(6, warmup=3, last=True), Guided(2, max_misfit=bound))
        with fastcache.enable(model, recipe) as cache:
            sample.generate(model, labels, steps=28, seed=3, cache=cache)
            records = [r for r in cache.stats if r.action == "reuse"]
            assert all(isinstance(r.signal, float) and r.signal >= 0 for r in records)
            reused.append(len(records))
    assert reused[1] < reused[0]


def test_the_modulated_guide_runs_no_block_on_a_reused_step(shipped: tuple) -> None:
    from fastcache.demo import sample

    model, labels = shipped
    calls = []
    hook = model.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    recipe = Recipe(Interval(4, warmup=3, last=True), Guided(1, guide="modulated"))
    with fastcache.enable(model, recipe) as cache:
        sample.generate(model, labels, steps=28, seed=3, cache=cache)
        assert len(calls) == cache.stats.computed < 28
    hook.remove()


def test_a_rule_on_the_misfit_of_the_step_itself_is_the_same_compiled(shipped: tuple) -> None:
    from fastcache.demo import sample

    model, labels = shipped
    outputs, actions = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        with fastcache.enable(model, Recipe(Misfit(0.3), Guided(2))) as cache:
            call = fastcache.compile(model, backend="eager") if compiled else model
            outputs.append(sample.generate(call, labels[:4], steps=28, seed=3, cache=cache))
            actions.append([r.action for r in cache.stats])
    assert actions[0] == actions[1]
    assert 5 < actions[0].count("compute") < 25
    assert torch.equal(*outputs)


def test_a_misfit_rule_needs_a_guide() -> None:
    with pytest.raises(ValueError, match="Guided"):
        Recipe(Misfit(0.3), Taylor(1))


@pytest.mark.parametrize("per_token", [False, True])
def test_the_modulated_guide_of_wan_is_what_its_attention_reads(per_token: bool) -> None:
    """Its modulation is no module but a table of the block, with one timestep or, as in 2.2, one per token."""
    block, seen = tiny.build("Wan3D")[0].blocks[0], []
    temb = torch.randn(2, 5, 6, 24) if per_token else torch.randn(2, 6, 24)
    args = (torch.randn(2, 5, 24), torch.randn(2, 3, 24), temb, None)
    block.attn1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    block(*args)
    assert torch.equal(BlockIO(block).modulated(block, args, {}), seen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_modulated_guide_of_a_dit_is_what_its_attention_reads(dtype: torch.dtype) -> None:
    """Its normalisation embeds timestep and label itself, in the dtype that it is told."""
    block, seen = tiny.build("DiT2D")[0].transformer_blocks[0].to(dtype), []
    given = {"timestep": torch.tensor([3.5, 700.0]), "class_labels": torch.tensor([1, 0])}
    hidden = torch.randn(2, 4, block.dim, dtype=dtype)
    block.attn1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    block(hidden, **given)
    io = BlockIO(block)
    assert torch.equal(io.modulated(block, (hidden,), given), seen[0])
    norm, (_, scale, shift, eps) = block.norm1.norm, io.modulated_parts(block, (hidden,), given)
    assert torch.equal(norm(hidden) * (1 + scale) + shift, seen[0]) and eps == norm.eps


class Ops(TorchDispatchMode):
    """Counts our ops, device reads, and new tensors of hidden-state size from whatever op."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.ours, self.reads, self.large = size, [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.reads += name.endswith("_local_scalar_dense")
        if name.startswith("fastcache::"):
            self.ours.append(name.split("::")[1])
        out = func(*args, **(kwargs or {}))
        given = {storage(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.numel() >= self.size and storage(t) not in given:
                self.large += 1
        return out


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("recipe", "limit"),
    [
        (Recipe(Interval(3), Guided(2)), ["_guide_into_", "linear_combine_device_"]),
        (Recipe(Interval(3), Guided(2, checked=True)), ["_check_into_", "linear_combine_device_"]),
        (Recipe(Interval(3), Taylor(1)), ["linear_combine_"]),
        (Recipe(Interval(3), Reuse()), []),  # one aten addition
        (Recipe(FirstBlock(100.0), Reuse()), ["residual_l1"]),
    ],
)
def test_ops_of_a_reused_step(recipe: Recipe, limit: list[str]) -> None:
    model, inputs = tiny.build("Wan3D")
    calls = tiny.trajectory("Wan3D", inputs, 12)
    hidden = 1 * 2 * 8 * 8 * 24
    made = []  # by an uncached model of one block, and of two
    for depth in (1, 2):
        shallow = tiny.build("Wan3D", depth=depth)[0]
        tiny.output(shallow, calls[0])
        with Ops(hidden) as uncached:
            tiny.output(shallow, calls[0])
        made.append(uncached.large)
    block = made[1] - made[0]
    looks = isinstance(recipe.when, FirstBlock) or isinstance(recipe.what, Guided)
    with fastcache.enable(model, recipe) as cache:
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i), Ops(hidden) as seen:
                tiny.output(model, call)
            if cache.stats[-1].action == "reuse":
                assert seen.ours == limit
                assert seen.large == made[0] - block + looks * block + 1
                assert not seen.reads
        assert cache.stats.reused


@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
def test_the_plan_counts_the_steps_that_a_guide_needs_first(warmup: int) -> None:
    model, inputs = tiny.build("Wan3D")
    recipe = Recipe(Interval(3, warmup=warmup), Guided(2))
    with fastcache.enable(model, recipe) as cache:
        for i, call in enumerate(tiny.trajectory("Wan3D", inputs, 12)):
            with cache.context("cond", step_index=i, num_inference_steps=12):
                tiny.output(model, call)
        computed = tuple(r.step for r in cache.stats if r.action == "compute")
    assert recipe.plan(12).computed == computed
