# SPDX-License-Identifier: Apache-2.0
"""The op that finds a guided prediction's weights, against a float64 solve."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache
from fastcache import ops
from fastcache.ops import exponential, guided

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
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_weights_and_misfit_equal_a_float64_solve(
    order: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, 37, 24, generator=g).to(dtype) for _ in range(order + 2)]
    prior = torch.tensor([1.5, 0.0, -0.5][:order])
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
    guides = [torch.full((1, 4, 4), value) for _ in range(4)]
    guide = torch.randn(1, 4, 4)
    weights, _ = ops.guided_weights(guide, guides[:3], torch.tensor([2.0, 0.0]))
    assert torch.equal(weights, torch.tensor([[1.0, 3.0, -2.0, 0.0]]))
    weights, _ = ops.guided_weights(guide, guides, torch.tensor([2.0, 0.5, 1.0]))
    assert torch.equal(weights, torch.tensor([[1.0, 3.0, -1.5, 0.5, -1.0]]))


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


def checked(
    guides: list[Tensor], values: list[list[Tensor]], prior: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """(weights, misfit) of the op, on values of several streams."""
    flat = [row for stream in values for row in stream]
    weights, misfit = torch.full((len(guides),), 7.0), torch.full((1,), 7.0)
    op = torch.ops.fastcache._check_into_.default
    op(weights, misfit, guides[0], guides[1:], flat, prior, before, 0.05)
    return weights, misfit


@each_backend
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_weights_are_drawn_to_the_prior_by_what_both_told_of_the_newest_value(
    order: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    guides = [torch.randn(2, 9, 8, generator=g).to(dtype) for _ in range(order + 2)]
    streams = [
        [torch.randn(shape, generator=g).to(dtype)[:, ::2] for _ in range(order + 1)]
        for shape in ((2, 10, 24), (2, 6, 16))
    ]
    prior, before = (torch.randn(k, generator=g) for k in (order, order - 1))
    plain = [
        torch.nn.functional.pad(p, (0, 1)) - torch.nn.functional.pad(p, (1, 0))
        for p in (prior, before)
    ]
    for weights in plain:
        weights[0] += 1
    found, _ = truth(guides[0], guides[1:], prior, 0.05)
    told, _ = truth(guides[1], guides[2:], before, 0.05)
    rows = [torch.cat([s[i].double().flatten() for s in streams]) for i in range(order + 1)]
    older = torch.stack(rows[1:])
    forecast = plain[1].double() @ older
    apart = told @ older - forecast
    best = apart @ (rows[0] - forecast) / (apart @ apart)
    want = torch.lerp(plain[0].double(), found, ((best + 1) / 2).clamp(0, 1))
    weights, misfit = checked(guides, streams, prior, before)
    assert weights[0] == 1
    torch.testing.assert_close(weights[1:].double(), want, rtol=0, atol=2e-5)
    assert torch.equal(misfit, ops.guided_weights(guides[0], guides[1:], prior, 0.05)[1])


@each_backend
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_values_that_tell_nothing_leave_the_weights_of_the_guide(value: float) -> None:
    guides = [torch.randn(1, 4, 4) for _ in range(5)]
    prior = torch.tensor([2.0, 0.5, 1.0])
    still = [[torch.full((1, 4, 4), value)] * 4]
    weights, _ = checked(guides, still, prior, torch.zeros(2))
    want, _ = ops.guided_weights(guides[0], guides[1:], prior, 0.05)
    torch.testing.assert_close(weights[None], want)


def draws(order: int) -> dict[str, tuple]:
    """Arguments of the ops that find weights, of one order."""
    guide, *guides = (torch.randn(2, 6, 8) for _ in range(order + 2))
    values = [torch.randn(2, 6, 4) for _ in range(2 * (order + 1))]
    out = torch.empty(order + 2), torch.empty(1)
    prior = torch.zeros(order)
    found = {"_guide_into_": (*out, guide, guides, prior, 0.05)}
    if order > 1:
        before = torch.zeros(order - 1)
        found["_check_into_"] = (*out, guide, guides, values, prior, before, 0.05)
        found["_exponential_weights"] = (values[:5], torch.tensor([0.5]), 1e-8)
    return found


@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_tracing_is_told_is_what_runs(order: int) -> None:
    for name, args in draws(order).items():
        op = getattr(torch.ops.fastcache, name).default
        result = torch.library.opcheck(op, args)
        assert set(result.values()) == {"SUCCESS"}, name


@each_backend
@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_in_their_place_are_those_of_the_public_op(order: int) -> None:
    weights, misfit, guide, guides, prior, ridge = draws(order)["_guide_into_"]
    torch.ops.fastcache._guide_into_.default(weights, misfit, guide, guides, prior, ridge)
    want = ops.guided_weights(guide, guides, prior, ridge)
    assert torch.equal(weights, want[0][0]) and torch.equal(misfit, want[1])


class Work(TorchDispatchMode):
    """Names of the operations that run but neither allocate nor look at what is there: on a GPU, a launch each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        idle = ("empty", "new_empty", "unbind", "unsqueeze", "select", "slice", "detach", "alias")
        name = str(func).split(".")[1]
        if str(func).startswith("aten.") and name not in idle:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(fastcache.backends()["cpp"] is not True, reason="extension not built")
@pytest.mark.parametrize("order", [2, 3])
def test_no_operation_on_a_few_numbers_runs_beside_the_kernels(order: int) -> None:
    # the reference of the check took 38 launches on a GPU, that of the exponentials 140
    bodies = {"_guide_into_": guided, "_check_into_": guided, "_exponential_weights": exponential}
    for name, args in draws(order).items():
        body = getattr(bodies[name], name)
        for backend, launches in (("cpp", False), ("reference", True)):
            with fastcache.backend(backend), Work() as work:
                body(*args)
            assert bool(work.found) == launches, (name, work.found)


@pytest.mark.parametrize(
    ("guides", "match"), [([torch.ones(2, 2)] * 1, "guides"), ([torch.ones(2, 2)] * 5, "guides")]
)
def test_the_op_names_what_is_wrong(guides: list[Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ops.guided_weights(torch.ones(2, 2), guides, torch.zeros(1))
