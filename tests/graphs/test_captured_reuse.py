# SPDX-License-Identifier: Apache-2.0
"""cudagraphs="reuse" on a stand-in for CUDA graphs: heads and reused steps are graphs, computed ones are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from test_compile import METHODS, RECIPES, Graphs, PlainModel, assert_quiet, drive, eager, fresh
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastcache
from fastcache.graphs import compiled
from fastcache.policies import REUSE
from fastcache.targets.control import HEAD, REST, WHOLE

CONFIGS: dict[str, Callable[[str], Any]] = {
    **{name: make for name, (make, _) in {**METHODS, **RECIPES}.items()},
    "first_block": lambda n: fastcache.FirstBlockCacheConfig(0.372 if n == "Flux" else 0.1),
    "first_block_taylor": lambda n: fastcache.Recipe(
        fastcache.FirstBlock(0.372 if n == "Flux" else 0.1, max_skips=3), fastcache.Taylor(1)
    ),
    "misfit_guided": lambda n: fastcache.Recipe(
        fastcache.Misfit(0.9), fastcache.Guided(1, guide="residual")
    ),
}

BLOCK = {"Flux": 1, "Wan3D": 2}  # attention calls of a block


class Replays(Graphs):
    """As CUDA graphs do it: outputs lie in memory of the graph's own, which is gone when a step is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Tensor] = []
        self.attention: list[int] = []  # calls per graph
        self.marked = self.replayed = 0

    def __call__(self, module: Any, example_inputs: Any) -> Callable:
        run = super().__call__(module, example_inputs)
        called = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        self.attention.append(sum("scaled_dot_product" in name for name in called))

        def replay(*args: Any) -> Any:
            self.replayed += 1
            outputs = run(*args)
            self.held += [o for o in outputs if isinstance(o, Tensor)]
            return outputs

        return replay

    def mark(self) -> None:
        self.marked += 1
        while self.held:
            self.held.pop().fill_(float("nan"))


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replays]:
    """A backend in place of Inductor's mode, which has no device here."""
    fresh()
    graphs = Replays()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graphs.mark)
    monkeypatch.setattr(
        compiled, "captured_options", lambda model, choice, options: {**options, "backend": graphs}
    )
    yield graphs


def steps(cache: fastcache.Cache) -> list[tuple]:
    return [(r.context, r.step, r.action) for r in cache.stats]


CASES = [
    *(("Wan3D", method) for method in CONFIGS),
    *(("Flux", method) for method in ("mag", "first_block", "taylorseer", "misfit_guided")),
]


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_only_heads_and_reused_steps_are_graphs(name: str, method: str, replays: Replays) -> None:
    model, inputs = tiny.build(name)
    with fastcache.enable(model, CONFIGS[method](name)) as cache:
        expected, decided = drive(cache, name, inputs, model), steps(cache)
    model, inputs = tiny.build(name)
    with fastcache.enable(model, CONFIGS[method](name)) as cache:
        call = fastcache.compile(model, cudagraphs="reuse")
        outputs = drive(cache, name, inputs, call)
        assert steps(cache) == decided
        modes = list(call._own.made)
    assert {action for _, _, action in decided} == {"compute", "reuse"}
    assert all(HEAD in mode or REUSE in mode for mode in modes)
    assert replays.count == len(modes) and replays.marked == replays.replayed
    assert_quiet(replays, 4)
    probed = cache.recipe.decides_inside
    nothing = (
        method == "easycache"
    )  # where the whole output is predicted, a reused step runs no program
    wanted = {HEAD, REST} if probed else set() if nothing else {WHOLE}
    assert {mode[-1] for mode in modes} == wanted
    if probed or method in ("mag", "interval_guided", "interval_taylor2"):  # the stack is skipped
        assert max(replays.attention) <= BLOCK[name]
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["first_block", "taylorseer", "pab"])
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_computed_steps_run_blocks_that_are_compiled(method: str, replays: Replays) -> None:
    name = "Flux"
    expected = eager(name, CONFIGS[method](name))
    fresh()
    model, inputs = tiny.build(name)
    regional = Graphs()
    with fastcache.enable(model, CONFIGS[method](name)) as cache:
        call = fastcache.compile(model, cudagraphs="reuse")
        model.compile_repeated_blocks(backend=regional, fullgraph=True)
        outputs = drive(cache, name, inputs, call)
        count = replays.count
        outputs += drive(cache, name, inputs, call, runs=1)
    assert replays.count == count == len(call._own.made)
    assert 0 < regional.count <= 9
    assert not counters["graph_break"]
    for got, want in zip(outputs, [*expected, *expected[: len(expected) // 2]], strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_the_halves_of_a_guidance_batch(replays: Replays) -> None:
    """What replays return is rebuilt into both halves, and nothing of it is the graph's memory."""
    torch.manual_seed(0)
    model = PlainModel().eval().requires_grad_(False)
    start, drift = torch.randn(4, 8, 16), torch.randn(4, 8, 16)
    config = fastcache.Recipe(
        fastcache.Interval(3),
        fastcache.Reuse(),
        where=fastcache.Guidance(tensor_format="BSC", grid=(2, 4)),
    )

    def run(cache: fastcache.Cache, call: Callable) -> list[Tensor]:
        outputs = []
        with torch.no_grad():
            for i in range(8):
                with cache.context(step_index=i, timestep=900.0 - 100 * i):
                    outputs.append(call(start + 0.1 * i * drift))
        return outputs

    with fastcache.enable(model, config) as cache:
        expected = run(cache, model)
        assert cache.stats.reused
    with fastcache.enable(model, config) as cache:
        outputs = run(cache, fastcache.compile(model, cudagraphs="reuse"))
    assert replays.count == 1 and replays.replayed > 2
    for got, want in zip(outputs, expected, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cudagraphs": "reused"}, "cudagraphs is 'reused', must be False, True or \"reuse\""),
        ({"cudagraphs": 2}, "cudagraphs is 2"),
        ({"cudagraphs": None}, "cudagraphs is None"),
        ({"cudagraphs": "reuse", "on_device": True}, "leave one of the two out"),
        ({"cudagraphs": True, "on_device": True}, "leave one of the two out"),
    ],
)
def test_choices_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    model = PlainModel().eval()
    with (
        fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.1)),
        pytest.raises(ValueError, match=message),
    ):
        fastcache.compile(model, **options)


@pytest.mark.parametrize("choice", [True, "reuse"])
def test_what_a_graph_needs_is_asked_for(choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PlainModel().eval()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=f"cudagraphs={choice!r}, but there is no CUDA device"):
            compiled.captured_options(model, choice, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="parameters on \\['cpu'\\]"):
        compiled.captured_options(model, choice, {})
    bare = nn.Module()
    with pytest.raises(ValueError, match="\\['backend'\\] came too"):
        compiled.captured_options(bare, choice, {"backend": "eager"})
    assert compiled.captured_options(bare, choice, {"fullgraph": True}) == {
        "fullgraph": True,
        "mode": "reduce-overhead",
    }
