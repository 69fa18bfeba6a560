# SPDX-License-Identifier: Apache-2.0
"""Every stage on the way it takes with a GPU, on a machine that has none: see `pretend_cuda.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))
pytest.importorskip("diffusers")

from bench import common  # noqa: E402
from bench.gpu import table, whole  # noqa: E402
from bench.gpu.session import Session  # noqa: E402

NO_CAPTURE = "there is no CUDA device here"  # what compile says for cudagraphs=True
EXPECTED = {  # kinds of rows, and how many at least
    "ceilings": {"machine": 1, "backends": 1, "matmul": 1},
    "correctness": {"ops": 4, "layouts": 8, "models": 8, "tests": 1},
    "kernels": {"op": 60, "host": 15},
    "programs": {"model": 1, "reads": 5, "skips": 4, "tests": 1},
    "runs": {"model": 1, "run": 11},
    "apart": {"model": 1, "step": 5},
    "regional": {"model": 1, "run": 3},
    "captured": {"model": 1, "run": 4},
    "whole": {"model": 1, "start": 1, "run": 1, "sanitizer": 1},
}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run bench/gpu.sh")
@pytest.mark.parametrize("stage", [stage.name for stage in table.FIRST])
def test_every_stage_finds_its_way(tmp_path, stage):
    path = tmp_path / "rows.jsonl"
    script = [sys.executable, ROOT / "tests" / "pretend_cuda.py", stage, path]
    done = subprocess.run(script, capture_output=True, text=True)
    found = common.read_lines(path)
    errors = [r["error"] for r in found if "error" in r]
    assert all(NO_CAPTURE in error for error in errors), done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == bool(errors)
    for name, least in EXPECTED[stage].items():
        assert sum(r["name"] == name for r in found) >= least, name
    assert all(r["kind"] == "cuda" and r["device"] == "Pretended GPU" for r in found)
    for row in (r for r in found if r["name"] == "reads"):  # the pretence reads once per step
        assert set(row["computed"] + row["reused"]) == {1} and row["places"]


@pytest.mark.parametrize(("code", "failed"), [(0, []), (9, ["sanitizer"])])
def test_what_the_memory_checker_says_is_a_row(tmp_path, monkeypatch, code, failed):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho ERROR SUMMARY: $2\nexit {code}\n")
    tool.chmod(0o755)
    session = Session("whole", tmp_path / "rows.jsonl", "cpu")
    monkeypatch.setattr(Session, "dry", False)
    monkeypatch.setattr(whole, "sanitizer", lambda: str(tool))
    whole.sanitize(session)
    (row,) = common.read_lines(session.path)
    assert (row["exit"], session.failed) == (code, failed)
    assert row["said"] == ["ERROR SUMMARY: memcheck"]
    monkeypatch.setattr(whole, "LEAST", session.limit + 1)
    whole.sanitize(session)
    assert common.read_lines(session.path)[1]["skipped"] == "no time left"
