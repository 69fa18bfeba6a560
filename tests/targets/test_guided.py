# SPDX-License-Identifier: Apache-2.0
"""Guided prediction: weights read off this step's first block, without asking the host."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache
from fastcache import FirstBlock, Guided, Interval, Misfit, Recipe, Reuse, Taylor, ops
from fastcache.models.block_io import BlockIO

demo = pytest.importorskip("fastcache.demo.sample")


BACKENDS = [n for n, v in fastcache.backends().items() if v is True and n in ("reference", "cpp")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fastcache.backend(request.param):
        yield


each_backend = pytest.mark.usefixtures("backend")


def truth(
    guide: Tensor, guides: list[Tensor], prior: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Weights of the cached values and misfit by a float64 solve of the ridge system."""
    g = [t.double().flatten() for t in (guide, *guides)]
    q, d = g[0] - g[1], torch.stack([a - b for a, b in pairwise(g[1:])])
    gram = d @ d.T
    pull = ridge * gram.diagonal().mean()
    w = torch.linalg.solve(gram + pull * torch.eye(len(d)), d @ q + pull * prior.double())
    weights = torch.nn.functional.pad(w, (0, 1)) - torch.nn.functional.pad(w, (1, 0))
    weights[0] += 1
    return weights, (q - w @ d).norm() / q.norm()


@each_backend
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_weights_and_misfit_equal_a_float64_solve(
    order: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, 37, 24, generator=g).to(dtype) for _ in range(order + 2)]
    prior = torch.tensor([1.5, 0.0][:order])
    weights, misfit = ops.guided_weights(tensors[0], tensors[1:], prior, 0.003)
    want, want_misfit = truth(tensors[0], tensors[1:], prior, 0.003)
    assert weights[0, 0] == 1
    assert torch.allclose(weights[0, 1:].double(), want, atol=1e-5)
    assert torch.allclose(misfit.double(), want_misfit, atol=1e-5)


@each_backend
def test_a_guide_that_moves_on_a_line_is_explained_exactly() -> None:
    start, slope = torch.randn(3, 8, 4), torch.randn(3, 8, 4)
    guide, *guides = (start + t * slope for t in (5.0, 3.0, 2.0))
    weights, misfit = ops.guided_weights(guide, guides, torch.zeros(1), 0.0)
    assert torch.allclose(weights, torch.tensor([[1.0, 3.0, -2.0]]), atol=1e-4)
    assert misfit.item() < 1e-3


@each_backend
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_degenerate_history_falls_back_to_the_prior(value: float) -> None:
    guides = [torch.full((1, 4, 4), value) for _ in range(3)]
    weights, _ = ops.guided_weights(torch.randn(1, 4, 4), guides, torch.tensor([2.0, 0.0]))
    assert torch.equal(weights, torch.tensor([[1.0, 3.0, -2.0, 0.0]]))


@each_backend
def test_per_sample_weights_equal_those_of_each_sample_alone() -> None:
    tensors = [torch.randn(3, 9, 8) for _ in range(4)]
    prior = torch.tensor([1.0, 0.0])
    together, misfit = ops.guided_weights(tensors[0], tensors[1:], prior, per_sample=True)
    for i in range(3):
        one, its = ops.guided_weights(
            tensors[0][i : i + 1], [t[i : i + 1] for t in tensors[1:]], prior
        )
        assert torch.equal(one[0], together[i])
        assert torch.equal(its[0], misfit[i])


@each_backend
def test_every_kth_token_of_any_shape_gives_the_weights_of_a_copy() -> None:
    # a kernel that takes the distance of rows for their width reads other tokens
    for shape in ((2, 10, 24), (2, 3, 10, 24), (4, 2, 3, 10, 8)):
        tensors = [torch.randn(shape)[..., ::4, :] for _ in range(4)]
        copies = [t.contiguous() for t in tensors]
        prior = torch.tensor([1.5, 0.0])
        for per_sample in (False, True):
            found = ops.guided_weights(tensors[0], tensors[1:], prior, per_sample=per_sample)
            whole = ops.guided_weights(copies[0], copies[1:], prior, per_sample=per_sample)
            torch.testing.assert_close(found, whole)


@each_backend
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_guides_without_elements_give_the_prior(shape: tuple, per_sample: bool) -> None:
    none = torch.empty(shape)
    weights, misfit = ops.guided_weights(none, [none] * 2, torch.ones(1), per_sample=per_sample)
    samples = shape[0] if per_sample else 1
    assert torch.equal(weights, torch.tensor([1.0, 2.0, -1.0]).expand(samples, 3))
    assert misfit.shape == (samples,) and misfit.isnan().all()


@pytest.mark.parametrize(
    ("guides", "match"), [([torch.ones(2, 2)] * 1, "guides"), ([torch.ones(2, 2)] * 4, "guides")]
)
def test_the_op_names_what_is_wrong(guides: list[Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ops.guided_weights(torch.ones(2, 2), guides, torch.zeros(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("order", 3),
        ("guide", "output"),
        ("ridge", -1.0),
        ("tokens", 0),
        ("max_misfit", float("nan")),
    ],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=field):
        Guided(**{field: value})


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
        (Recipe(Interval(3), Guided(2)), ["guided_weights", "linear_combine_device_"]),
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
