# SPDX-License-Identifier: Apache-2.0
"""The example server: requests interleaved on one model, each its own picture, memory within the budget."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    module = sys.modules["serve"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def served(
    example: Any, requests: int, rate: float, max_bytes: int | None, qualities: Any = ("balanced",)
) -> tuple[dict, Any]:
    server = example.Server(example.load_model(), "balanced", max_bytes)
    try:
        return asyncio.run(example.serve(server, requests, rate, 0, qualities)), server
    finally:
        server.close()


def test_interleaved_requests_get_the_pictures_they_get_alone(example, capsys):
    together, server = served(example, 4, rate=1000.0, max_bytes=None)
    assert server.cache.stats.reused
    order = [r.request for r in server.cache.stats]
    assert len(set(order[:12])) > 1  # they did take turns
    apart, _ = served(example, 4, rate=0.5, max_bytes=None)  # one is done before the next arrives
    assert sorted(together) == sorted(apart) == [0, 1, 2, 3]
    for number, picture in together.items():
        assert torch.equal(picture, apart[number])
    assert "calls computed" in capsys.readouterr().out


def test_each_request_has_the_quality_that_it_asks_for(example, capsys):
    """What clients of one quality get, they get among clients of others too."""
    together, server = served(example, 6, 1000.0, None, example.QUALITIES)
    out = capsys.readouterr().out
    asked = {int(n): q for n, q in re.findall(r"request +(\d+): digit \d, (\w+),", out)}
    assert len(asked) == 6 and len(set(asked.values())) > 2 and "off" in asked.values()
    assert not any(d.pool.states for d in server.cache.methods)
    apart, _ = served(example, 6, 3.0, None, example.QUALITIES)
    for number, quality in asked.items():
        actions = {r.action for r in server.cache.stats if r.request == number}
        assert ("reuse" in actions) == (quality != "off")
        assert torch.equal(together[number], apart[number])


def test_the_budget_holds_while_requests_come_and_go(example, capsys):
    budget = 2**19
    pictures, server = served(example, 5, rate=1000.0, max_bytes=budget)
    assert len(pictures) == 5 and 0 < server.most <= budget
    assert any(r.reason == "no room for a cache" for r in server.cache.stats)


def test_the_command_prints_what_was_reused(example, capsys):
    assert example.main(["--requests", "2", "--rate", "1000"]) == 0
    assert "reused; at most" in capsys.readouterr().out
