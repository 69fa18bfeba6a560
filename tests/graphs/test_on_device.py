# SPDX-License-Identifier: Apache-2.0
"""FirstBlockCache decided on the device: one graph, the same decisions and bits, nothing read by the host."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_compile import Graphs, PlainModel, assert_quiet, drive, fresh

import fastcache
from fastcache import FirstBlock, Recipe, Reuse, Stack, sync
from fastcache.graphs.on_device import WRITES, within

written = pytest.mark.skipif(
    not WRITES, reason="branches of this torch's cond cannot write into storage"
)

CASES: list[tuple[str, Any]] = [
    ("Wan3D", fastcache.FirstBlockCacheConfig(0.1)),
    ("Wan3D", Recipe(FirstBlock(0.5, warmup=3, max_skips=2, last=True))),
    ("Wan3D", Recipe(FirstBlock(0.1, per_sample=True))),
    ("Flux", fastcache.FirstBlockCacheConfig(0.372)),
    ("LTX", fastcache.FirstBlockCacheConfig(0.05)),
    ("QwenImage", fastcache.FirstBlockCacheConfig(0.5)),
]


@pytest.mark.parametrize("sums", [[1.0, 4.0], [[1.0, 4.0], [3.0, 2.0]], [0.0, 0.0], [1.0, 0.0]])
@pytest.mark.parametrize("threshold", [0.25, 1.6, float("inf")])
def test_the_rule_is_the_hosts(sums: list, threshold: float) -> None:
    found, small = within(torch.tensor(sums), threshold)
    change = sync.relative_change(torch.tensor(sums))
    assert torch.equal(found, torch.tensor([change], dtype=torch.float64)) or change != change
    run = FirstBlock(threshold, warmup=0, max_skips=0, last=False)
    wanted = run.decide(run.begin(), fastcache.policies.Step(3, None), change).action == "reuse"
    assert bool(small) == wanted


@written
@pytest.mark.parametrize(("name", "config"), CASES)
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_one_graph_decides_and_computes_as_the_host_does(
    name: str, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny.build(name)
    with fastcache.enable(model, config) as cache:
        expected = drive(cache, name, inputs, model)
        decided = [(r.context, r.step, r.action) for r in cache.stats]
        changes = [r.signal for r in cache.stats]
    assert {action for _, _, action in decided} == {"compute", "reuse"}
    fresh()
    model, inputs = tiny.build(name)
    graphs = Graphs()
    with fastcache.enable(model, config) as cache:
        compiled = fastcache.compile(model, on_device=True, backend=graphs)

        def unread(**step: Any) -> Any:
            with monkeypatch.context() as patch:
                for reading in ("relative_change", "numbers"):  # of a decision, by the host
                    patch.setattr(sync, reading, lambda *_: pytest.fail("the host has read"))
                return compiled(**step)

        found = drive(cache, name, inputs, unread)
        assert [(r.context, r.step, r.action) for r in cache.stats] == decided
        late = [r.signal for r in cache.stats]
    assert_quiet(graphs, 1)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
    told = [(a, b) for a, b in zip(late, changes, strict=True) if b is not None]
    assert told and all(a == b for a, b in told)


@written
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_inductor_and_another_shape() -> None:
    fresh()
    torch.manual_seed(0)
    model = PlainModel().eval().requires_grad_(False)
    start, drift = torch.randn(1, 8, 16), torch.randn(1, 8, 16)
    steps = [start + 0.02 * i * drift for i in range(8)]
    with fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.15)) as cache, torch.no_grad():
        runs = []
        for call in (model, fastcache.compile(model, on_device=True)):
            outputs = []
            for tokens in (8, 5):
                for x in steps:
                    with cache.context(request=tokens):
                        outputs.append(call(x[:, :tokens]))
                cache.reset(tokens)
            runs.append(outputs)
        half = len(cache.stats) // 2
        actions = [r.action for r in cache.stats]
        assert actions[:half] == actions[half:] and "reuse" in actions
    for got, want in zip(*runs, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if WRITES:
        monkeypatch.setattr("fastcache.graphs.on_device.WRITES", False)
    with (
        fastcache.enable(model := PlainModel().eval(), fastcache.FirstBlockCacheConfig(0.1)),
        pytest.raises(ValueError, match=r"needs torch 2\.12 or later"),
    ):
        fastcache.compile(model, on_device=True)


@written
@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (fastcache.TaylorSeerCacheConfig(), {}, "FirstBlockCacheConfig alone"),
        (Recipe(FirstBlock(0.1), fastcache.Taylor(1)), {}, "FirstBlockCacheConfig alone"),
        (Recipe(FirstBlock(0.1), Reuse(), Stack()), {"max_bytes": 10**6}, "max_bytes"),
        (Recipe(FirstBlock(0.1)), {"cache_dtype": torch.bfloat16}, "cache_dtype"),
    ],
)
def test_what_it_cannot_drive_is_refused(config: Any, options: dict, message: str) -> None:
    model = PlainModel().eval()
    with (
        fastcache.enable(model, config, **options),
        pytest.raises(ValueError, match=message),
    ):
        fastcache.compile(model, on_device=True)
