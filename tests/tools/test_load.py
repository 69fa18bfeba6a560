# SPDX-License-Identifier: Apache-2.0
"""Traffic on one model: what the benchmark of many users measures, and a short soak."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

from bench import load, load_soak


def test_a_short_soak_crosses_nothing_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(load_soak, "GOES", 0.03)
    monkeypatch.setattr(load_soak, "RAISES", 0.06)
    found = load_soak.soak(lambda found: found.counts["arrived"] < 24, seed=3, every=10)
    assert found.counts["arrived"] == 24 and not found.lost
    assert found.counts["gone"] and found.counts["raised"] and found.counts["served"] > 12
    assert not found.counts["crossed"] and found.worst < 1e-4
    assert found.readings and found.most_bytes


def test_a_crossed_picture_is_seen(monkeypatch):
    """The check can fail: a request that begins again without having been forgotten."""
    wrong = load_soak.Alone.__call__
    monkeypatch.setattr(
        load_soak.Alone, "__call__", lambda self, order: wrong(self, order).roll(1, dims=1)
    )
    found = load_soak.soak(lambda found: found.counts["arrived"] < 3, every=100)
    assert found.counts["crossed"] == found.counts["served"] > 0


def test_every_server_serves_the_same_pictures_as_its_recipe_alone(tmp_path):
    path = tmp_path / "load.jsonl"
    assert load.main(["--quick", "--requests", "3", "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    near = {(r["server"], r["most"]): r["psnr"] for r in rows}
    assert near["uncached", 1] is None and near["uncached", 8] > 100  # infinite, and rounding
    alone, mixed = near["fastcache, one at a time", 1], near["fastcache, mixed", 8]
    assert alone > 30 and abs(mixed - alone) < 0.1
    assert all(r["p50"] <= r["p95"] and r["requests_per_second"] > 0 for r in rows)
