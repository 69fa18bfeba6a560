# SPDX-License-Identifier: Apache-2.0
"""The sweep of methods by name: every setting is a recipe, and its tables compare at equal compute."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import method_sweeps, method_tables, report, subjects
from bench.quality import Bench

HERE = {"bench": "methods", "kind": "cpu", "dtype": "fp32", "steps": 28, "guidance": "none"}


def row(method: str, predictor: str, setting: str, compute: float, psnr: float | None) -> dict:
    point = {"system": "fastcache", "method": method, "predictor": predictor, "setting": setting}
    return {**HERE, **point, "model": "flux", "seeds": 1, "compute": compute, "psnr": psnr}


ROWS = [
    row("TeaCache", "reuse", "0.1, plain", 0.6, 44.0),
    row("TeaCache", "reuse", "0.3, plain", 0.2, 30.0),
    row("TeaCache", "order 1", "0.1, plain", 0.5, 50.0),
    row("TeaCache", "order 1", "0.2, plain", 0.4, 36.0),
    row("TeaCache", "order 1", "0.3, plain", 0.1, 10.0),  # cheaper than any with reuse
    row("TeaCache", "order 1", "0.05, plain", 1.0, None),  # all computed: nothing to compare
    row("EasyCache", "reuse", "0.1", 0.5, 40.0),
]


def test_curves_are_read_between_their_points_alone():
    found = method_tables.curves(ROWS)
    assert [name for name, _ in found] == ["TeaCache, plain", "TeaCache, plain", "EasyCache"]
    assert method_tables.at(found["TeaCache, plain", "reuse"], 0.3) == pytest.approx(33.5)
    for share in (0.1, 0.7):
        assert method_tables.at(found["TeaCache, plain", "reuse"], share) is None


def test_a_lead_is_taken_at_equal_compute():
    ((model, method, ahead),) = method_tables.leads(ROWS)
    assert (model, method) == ("flux", "TeaCache, plain")
    assert ahead == pytest.approx([36.0 - 37.0, 50.0 - 40.5])
    (claim,) = method_tables.claims(ROWS)
    assert claim.met and claim.found == "4.25 dB"
    (claim,) = method_tables.claims([*ROWS[:2], ROWS[3]])
    assert not claim.met


def test_every_setting_that_was_committed_is_one_of_the_sweep():
    """So the tables say what the command measures."""
    for model in ("flux", "video", "pictures"):
        cell = subjects.Cell(model, "fp32", 28, "none")
        keys = [p.key for p in method_sweeps.named_points(cell, subjects.SUBJECTS[model]())]
        assert len(set(keys)) == len(keys)
        rows = [r for r in report.results() if r["bench"] == "methods" and r["model"] == model]
        measured = {tuple(r[k] for k in ("system", "method", "predictor", "setting")) for r in rows}
        assert {k for k in measured if k[1] != "uncached"} == set(keys)
        assert not any(r.get("error") for r in rows)


def test_what_is_learnt_of_a_model_is_measured_once_and_where_it_is_asked_for():
    cell = subjects.Cell("flux", "fp32", 8, "none")
    subject = subjects.flux()
    learnt = method_sweeps.Learnt(subject, 8)
    x, t = learnt.alphas()
    assert 0 < x < 1 and 0 < t < 1 and learnt.calibration() is learnt.calibration()
    bench = Bench(subject, cell, 2)
    points = {p.key[1:]: p for p in method_sweeps.named_points(cell, subject)}
    for key in (
        ("SeaCache", "order 1", "0.6"),
        ("SenCache", "reuse", "1.5"),
    ):
        found = bench.row(points[key], bench.reference)
        assert not found.get("error") and 0 < found["compute"] < 1
