# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cache-dit's reused step, and what its function calls and instructions come to."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("cache_dit", minversion="1.5")
pytest.importorskip("diffusers", minversion="0.36")

engines = pytest.importorskip("bench.engines", reason="needs the source tree")


def test_a_reused_step_of_cache_dit_calls_and_runs_less(tmp_path):
    """Counts do not depend on what else the machine does; times do."""
    out = tmp_path / "engines.jsonl"
    assert engines.main(["--quick", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["case"] for r in rows} == {engines.FLOOR, *engines.CONTENDERS}
    found = engines.claims(rows)
    called = [c for c in found if "function calls" in c["claim"]]
    assert len(called) == 4 and all(claim["met"] for claim in called), called
    # which differ a little by the version of Python
    run = [c for c in found if "instructions" in c["claim"]]
    assert len(run) == 4 and all(c["value"] <= 1.1 * c["bound"] for c in run), run


def test_instructions_are_counted_and_nothing_else():
    def step(n):
        return lambda: sum(i for i in range(n))

    few, more, most = (engines.executed(step(n)) for n in (0, 10, 20))
    assert 0 < few < more and most - more == more - few
