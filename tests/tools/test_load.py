# SPDX-License-Identifier: Apache-2.0
"""Traffic on one model: what the benchmark of many users measures, and a short soak."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

from bench import figures, load, load_soak, load_tables


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
    near = {(r["server"], r["setting"]): r["psnr"] for r in rows}
    exact = near["uncached", "one at a time"], near["uncached", "batches of 8"]
    assert exact[0] is None and exact[1] > 100  # infinite, and rounding
    (ours,) = load.OURS
    alone, mixed = near["fastcache, one at a time", ours], near["fastcache, mixed", ours]
    assert alone > 30 and abs(mixed - alone) < 0.1
    assert 30 < near["fastcache, mixed", "quality"] < 100
    assert all(r["p50"] <= r["p95"] and r["requests_per_second"] > 0 for r in rows)


def test_the_picture_shows_every_server(tmp_path):
    row = {
        "bench": "load", "server": "fastcache, mixed", "setting": "every 4", "most": 8, "psnr": 46.0, "load": 5.0,
        "requests_per_second": 10.0, "rates": [9.0, 10.0, 11.0], "p50": 0.2, "p95": 0.4,
    }  # fmt: skip
    exact = {**row, "server": "uncached", "setting": "one at a time", "most": 1, "psnr": None}
    figure = load_tables.load_figure([exact, row])
    quality, latency = figure.axes
    assert [t.get_text() for t in latency.get_yticklabels()] == [
        "uncached, one at a time  1", "fastcache, mixed, every 4  2",
    ]  # fmt: skip
    assert [t.get_text() for t in quality.texts] == ["1", "2"]
    assert quality.get_yticklabels()[-1].get_text() == "exact"
    figures.save(figure, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000
