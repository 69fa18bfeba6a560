# SPDX-License-Identifier: Apache-2.0
"""The run on a GPU, without one: its limits, its rows when it is cut short, what travels, a dry run."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastcache

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import chains, common, report  # noqa: E402
from bench.gpu import __main__ as program  # noqa: E402
from bench.gpu import apart, captured, correctness, kernels, picture, runs, table  # noqa: E402
from bench.gpu.session import Session  # noqa: E402

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def session(tmp_path) -> Session:
    return Session("kernels", tmp_path / "rows.jsonl", "cpu")


def rows(session: Session) -> list[dict]:
    return common.read_lines(session.path)


# --- limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", table.CALLS)
def test_the_stages_of_a_call_fit_into_it(call):
    stages = table.CALLS[call]
    assert sum(stage.limit for stage in stages) <= table.MOST <= 560
    for stage in stages:
        module = importlib.import_module(f"bench.gpu.{stage.module or stage.name}")
        assert callable(module.run)


def test_stages_are_chosen_by_name():
    assert table.chosen([]) == list(table.FIRST)
    assert [s.name for s in table.chosen(["runs", "second"])] == ["runs", "train", "evaluate"]
    with pytest.raises(ValueError, match="nonsense"):
        table.chosen(["nonsense"])


SCRIPTS = {  # what a stage may do; each is given the file of rows
    "fine": "",
    "exits": "raise SystemExit(3)",
    "dies": "import os; os.kill(os.getpid(), 11)",
    "hangs": "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)",
    "late": "",
}
ROW = 'import sys; open(sys.argv[1], \'a\').write(\'{{"stage": "{name}", "name": "first"}}\\n\')\n'


def test_a_stage_that_ends_badly_leaves_its_rows_and_a_reason(session, monkeypatch):
    def command(stage, session, limit):
        return [
            sys.executable,
            "-c",
            ROW.format(name=stage.name) + SCRIPTS[stage.name],
            session.path,
        ]

    monkeypatch.setattr(program, "command", command)
    monkeypatch.setattr(program, "LEAST", 0.5)
    monkeypatch.setattr(program, "PATIENCE", 1)
    stages = [table.Stage(name, 3.0 if name == "hangs" else 60.0, "") for name in SCRIPTS]
    late = stages.pop()
    failed = program.run(stages, session, time.time() + 600)
    failed += program.run([late], session, time.time())
    reasons = {r["of"]: r.get("reason") for r in rows(session) if r["name"] == "stage"}
    assert reasons == {
        "fine": None, "exits": "exit 3", "dies": "signal 11",
        "hangs": "killed after 3 s", "late": "no time left",
    }  # fmt: skip
    assert [f.split()[0] for f in failed] == ["exits", "dies", "hangs", "late"]
    assert [r["stage"] for r in rows(session) if r["name"] == "first"] == [s.name for s in stages]


def test_nothing_that_a_stage_started_outlives_it(tmp_path):
    mark = tmp_path / "pid"
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); "
    child += "open(sys.argv[1], 'w').write(str(p.pid))"
    assert program.watch([sys.executable, "-c", child, str(mark)], 60) == ""
    state = Path(f"/proc/{mark.read_text()}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")


def test_one_failure_is_a_row_and_stops_nothing(session):
    with session.attempt("op", op="first"):
        raise RuntimeError("no such kernel\nand more")
    with session.attempt("op", op="second"):
        session.row("op", op="second", us_p50=1.0)
    first, second = rows(session)
    assert first["error"] == "RuntimeError: no such kernel" and first["op"] == "first"
    assert "error" not in second and session.failed == ["op"]


# --- what is measured -----------------------------------------------------------------------------------


def test_a_wrong_kernel_and_an_unwritten_output_are_found(monkeypatch):
    fine = next(op for op in chains.OPS if op.name == "residual_apply")

    def wrong(b):
        b["out"].copy_(b["x"] + b["r"])
        if fastcache.ops.dispatch.active("cpu") != "reference":
            b["out"][-1, -1] += 1

    def unwritten(b):
        b["out"][:-1].copy_((b["x"] + b["r"])[:-1])
        if fastcache.ops.dispatch.active("cpu") == "reference":
            b["out"].copy_(b["x"] + b["r"])

    made = [dataclasses.replace(fine, name=f.__name__, ours=f) for f in (wrong, unwritten)]
    monkeypatch.setattr(correctness, "OPS", (fine, *made))
    backend = correctness.kernels_of("cpu")[0]
    found = correctness.ops_agree(backend, (8, 16), "fp32", "cpu")
    assert [w.split()[0] for w in found["wrong"]] == ["wrong", "unwritten"]
    assert (found["checked"], found["equal"]) == (3, 1)


def test_a_kernel_that_ignores_a_layout_is_found(monkeypatch):
    """As one does that walks a transposed tensor as if it were contiguous."""
    right = correctness.ops.quantize_store

    def flat(y, x):
        if fastcache.ops.dispatch.active("cpu") == "reference":
            return right(y, x)
        as_stored = [torch.as_strided(t, t.shape, torch.empty(t.shape).stride()) for t in (y, x)]
        return right(*as_stored)

    monkeypatch.setattr(correctness.ops, "quantize_store", flat)
    wrong = {
        layout: [w.split()[0] for w in found["wrong"]]
        for layout, places in correctness.LAYOUTS.items()
        if (found := correctness.layouts_agree(places, torch.float32, "cpu", small=True))
    }
    assert wrong["contiguous"] == [] and "quantize_store" in wrong["transposed"]


def test_a_backend_that_lends_the_reference_is_not_timed_as_its_own():
    named = {op.name.split()[0]: op for op in chains.OPS}
    assert not kernels.has_kernel(named["taylor_update"], "cuda")
    assert kernels.has_kernel(named["residual_l1"], "cuda")
    assert not any(kernels.has_kernel(op, "reference") for op in chains.OPS)


def test_a_step_taken_apart():
    ran = [
        apart.Span("gemm", 0.0, 10.0),
        apart.Span("residual_l1", 12.0, 15.0),
        apart.Span("Memcpy DtoH (Device -> Pageable)", 16.0, 17.0),
        apart.Span("gemm", 57.0, 60.0),
        apart.Span("other stream", 58.0, 62.0),
    ]
    found = apart.summary(ran)
    assert (found["kernels"], found["to_host"], found["to_device"]) == (4, 1, 0)
    assert (found["busy_us"], found["span_us"]) == (19.0, 62.0)
    assert (found["read_gap_us"], found["largest_gap_us"]) == (40.0, 40.0)
    assert found["longest"][0] == ["gemm", 2, 13.0]
    assert apart.summary([])["read_gap_us"] is None


def test_captured_reuse_is_asked_for_by_name_where_it_is_known(monkeypatch):
    def knows(model, *, cudagraphs: bool | str = False):
        """Any version that takes more than a bool."""

    def captures_all(model, *, cudagraphs="x"):
        """A version of before."""

    captures_all.__annotations__["cudagraphs"] = "bool"
    monkeypatch.setattr(fastcache, "compile", knows)
    assert captured.takes_reuse() == "reuse"
    monkeypatch.setattr(fastcache, "compile", captures_all)
    with pytest.raises(TypeError, match="reuse"):
        captured.takes_reuse()


def test_the_second_call_says_what_is_not_in_the_tree(session, monkeypatch):
    monkeypatch.setattr(picture, "COMMANDS", {"kernels": ("no_such_script", [])})
    picture.run(session)
    (row,) = rows(session)
    assert "no_such_script.py is not in this tree" in row["skipped"] and not session.failed


# --- the script -----------------------------------------------------------------------------------------


@needs_bash
def test_the_script_parses():
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu.sh"], check=True)


def dry(out: Path, *names: str, **environment: str) -> tuple[int, list[dict], str]:
    """Exit status, rows and output of a dry run."""
    told = {"FASTCACHE_GPU_DRY": "1", "OUT": str(out), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *names],
        env=os.environ | told | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, common.read_lines(out / "gpu-dry.jsonl"), done.stdout + done.stderr


ORIGIN = ("device", "kind", "torch", "triton", "commit", "threads", "date", "python")


@pytest.mark.slow
@needs_bash
def test_a_dry_run_takes_every_step(tmp_path):
    pytest.importorskip("diffusers")
    code, found, said = dry(tmp_path)
    assert code == 0, said[-3000:]
    assert not [r for r in found if "error" in r]
    assert all(set(ORIGIN) <= set(r) for r in found)
    ended = [r["of"] for r in found if r["name"] == "stage"]
    assert ended == [stage.name for stage in table.FIRST]
    by_stage = {s.name: [r for r in found if r["stage"] == s.name] for s in table.FIRST}
    assert all(part[0]["name"] == "copy" and len(part) > 1 for part in by_stage.values())
    timed = {(r["op"], r["contender"]) for r in by_stage["kernels"] if r["name"] == "op"}
    assert {op.name for op in chains.OPS} == {op for op, _ in timed}
    labels = [
        (r["system"], r["method"], r["compiled"]) for r in by_stage["runs"] if r["name"] == "run"
    ]
    assert labels == list(runs.WANTED)
    for row in (r for r in by_stage["runs"] if r.get("decided")):
        assert 2 * row["computed"] == row["decided"]["computed"], row["method"]
    shown = [b.text for b in report.blocks(found) if b.kind == "h3"]
    assert {"runs: run", "apart: step", "kernels: op"} <= set(shown)


@pytest.mark.slow
@needs_bash
def test_killed_half_way_every_stage_keeps_what_it_measured(tmp_path):
    pytest.importorskip("diffusers")
    code, found, said = dry(tmp_path, FASTCACHE_GPU_DIES_AFTER="2")
    assert code == 1 and "failed: ceilings (signal 9), correctness (signal 9)" in said
    for stage in table.FIRST:
        assert len([r for r in found if r["stage"] == stage.name]) == 2, stage.name
        (end,) = (r for r in found if r["name"] == "stage" and r["of"] == stage.name)
        assert not end["ok"] and end["reason"] == "signal 9"


@needs_bash
def test_the_second_call_runs_dry(tmp_path):
    code, found, said = dry(tmp_path, "second")
    assert code == 0, said[-3000:]
    assert [r["of"] for r in found if r["name"] == "stage"] == ["train", "evaluate"]
