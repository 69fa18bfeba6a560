# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cache-dit's reused step, and what its function calls come to."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("cache_dit", minversion="1.5")
pytest.importorskip("diffusers", minversion="0.36")

engines = pytest.importorskip("bench.engines", reason="needs the source tree")


def test_a_reused_step_of_cache_dit_calls_fewer_functions(tmp_path):
    """Counts do not depend on what else the machine does; times do."""
    out = tmp_path / "engines.jsonl"
    assert engines.main(["--quick", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["case"] for r in rows} == {engines.FLOOR, *engines.CONTENDERS}
    found = [c for c in engines.claims(rows) if "function calls" in c["claim"]]
    assert len(found) == 4 and all(claim["met"] for claim in found), found
