# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, in their --quick form, and write valid JSON lines; the report notices staleness."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import __main__ as program  # noqa: E402
from bench import (  # noqa: E402
    catalogue,
    chains,
    claims,
    common,
    contenders,
    figures,
    graphs,
    models,
    ops,
    overhead,
    quality,
    quality_figures,
    report,
    snippets,
    soak,
    systems,
    tune,
    tune_tables,
)
from bench import cells as split  # noqa: E402
from bench import steps as steps_bench  # noqa: E402
from bench.traffic import Traffic  # noqa: E402

ORIGIN = ("device", "kind", "torch", "triton", "commit", "threads", "date")


@pytest.fixture(autouse=True)
def forget_graphs():
    """Graphs of other tests count against the recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows_of(main, path: Path, *args: str) -> list[dict]:
    """What a benchmark writes; every line says where it comes from."""
    assert main([*args, "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    assert all(set(ORIGIN) <= set(row) for row in rows)
    return rows


def test_ops(tmp_path):
    picture = tmp_path / "ops.png"
    rows = rows_of(
        ops.main, tmp_path / "ops.jsonl", "--quick", "--op", "residual_l1 + store", "of 3",
        "guided", "--compile", "of 3", "--dtype", "bf16", "--plot", str(picture),
    )  # fmt: skip
    cells = {(r["op"], r["contender"]): r for r in rows}
    for op in ("residual_l1 + store", "linear_combine of 3"):
        assert cells[op, "copy"]["of_copy"] == pytest.approx(1.0)
        assert cells[op, "diffusers"]["passes"] > cells[op, "diffusers"]["min_passes"]
        assert {"diffusers", "cache-dit", "reference"} <= {c for o, c in cells if o == op}
    assert {"reference", "copy"} <= {c for o, c in cells if o == "guided_weights of order 2"}
    assert ("linear_combine of 3", "compile") in cells
    assert ("residual_l1 + store", "compile") not in cells
    assert all(r["p20"] <= r["p50"] <= r["p80"] for r in rows)
    assert picture.stat().st_size > 1000


def test_ops_refuses_to_time_a_wrong_kernel():
    """A benchmark of a kernel that computes something else would be worthless."""
    op = next(o for o in chains.OPS if o.name == "residual_apply")
    wrong = {"reference": op.ours, "C++": lambda b: b["out"].fill_(7.0)}
    buffers = {name: torch.randn(8, 16) for name in op.tensors.split()}
    with pytest.raises(AssertionError):
        ops._check(op, wrong, buffers)


def test_overhead(tmp_path):
    pytest.importorskip("diffusers")
    rows = rows_of(overhead.main, tmp_path / "overhead.jsonl", "--quick")
    cases = {r["case"] for r in rows}
    assert {"uncached model", "MagCache, diffusers", "MagCache, fastcache, compile"} <= cases
    assert {c["claim"] for c in overhead.claims(rows)} == {name for name, *_ in overhead.WANT}


def test_soak(tmp_path):
    pytest.importorskip("diffusers")
    rows = rows_of(soak.main, tmp_path / "soak.jsonl", "--quick")
    assert len(rows) == len(soak.configs())
    assert all(0 < r["most_bytes"] <= r["max_bytes"] and r["reused"] for r in rows)


def test_tune(tmp_path):
    pytest.importorskip("diffusers")
    rows = rows_of(tune.main, tmp_path / "tune.jsonl", "--quick")
    assert {r["solver"] for r in rows} == set(tune_tables.SOLVERS)
    euler = [r["psnr"] for r in rows if r["solver"] == "euler" and not r["recipe"]]
    assert euler == sorted(euler) and len(euler) == 3
    table = tune_tables.more_steps(rows)
    assert f"| {euler[0]:.1f} |" in table
    best = {
        n: max(r["psnr"] for r in rows if r["computed"] == n and not r["recipe"]) for n in (4, 6)
    }
    nearest = [(n, tune_tables.cached(rows, s, n)) for n in best for s in tune_tables.CACHED]
    ahead = [r["psnr"] > best[n] for n, r in nearest if r is not None]
    assert len(ahead) == 4 and table.count("**") == 2 * sum(ahead), (
        "those ahead of all solvers are bold"
    )
    figures.save(tune_tables.more_steps_figure(rows), tmp_path / "tune.png")


def test_graphs(tmp_path):
    pytest.importorskip("diffusers")
    rows = rows_of(graphs.main, tmp_path / "graphs.jsonl", "--quick")
    # diffusers' hooks refuse a model of a class that they do not know
    assert all(r["system"] == "diffusers" for r in rows if "error" in r)
    rows = [r for r in rows if "error" not in r]
    ours = [r for r in rows if r["system"] == "fastcache"]
    theirs = [r for r in rows if r["system"] == "diffusers"]
    assert theirs and all(r["breaks"] == 0 and r["fullgraph"] == "yes" for r in ours)
    assert all(r["breaks"] and r["fullgraph"].startswith("fails") for r in theirs)
    assert all(r["difference"] == 0 for r in rows)


def test_steps(tmp_path):
    pytest.importorskip("diffusers")
    rows = rows_of(steps_bench.main, tmp_path / "steps.jsonl", "--quick")
    found = {(r["system"], r["method"]): r for r in rows}
    for method in ("MagCache", "FirstBlock", "TaylorSeer", "PAB", "FasterCache"):
        for system in ("fastcache", "diffusers"):
            assert found[system, method]["reused_ms"] > 0
    assert found["fastcache", "MagCache"]["launches"] <= found["diffusers", "MagCache"]["launches"]
    assert found["fastcache", "MagCache"]["reads"] == 0
    assert all("own_ms" in found[s, "FirstBlock"] for s in ("diffusers", contenders.PASSES))
    assert len(figures.own_figure(figures.own_rows(rows)).axes) == 1


SMALL = {  # a slice that is as narrow as its inputs let it be
    "wan-slice": {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 16},
    "cogvideox-slice": {"num_attention_heads": 1, "time_embed_dim": 4},
    "flux-slice": {"num_attention_heads": 1},
}


@pytest.mark.parametrize("name", ["digits", *SMALL])
def test_every_system_follows_the_schedule_it_is_timed_on(name):
    """Otherwise computed steps would be reported as reused ones."""
    pytest.importorskip("diffusers")
    make = models.MODELS[name]
    if name in SMALL:
        make = dataclasses.replace(make, fields={**make.fields, **SMALL[name]})
    subject = make(1, 10, 16, "cpu")
    for contender in catalogue.contenders(subject, "eager"):
        if contender.attached is None:
            continue
        whole = contender.kept is not None
        if name in SMALL and not whole:  # timed on the trained model
            continue
        calls = [n for n, _ in contender.call.named_modules() if n.endswith(".to_q")]
        found = contender.call.get_submodule(calls[-1 if whole else 0])
        plan, computed, ran = contenders.own_plan(contender.method, 10), [], []
        found.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        for i, inputs in enumerate(subject.calls):
            ran.clear()
            systems.CLOCK["t"] = t = contenders.timestep(i, 10)
            if contender.force is not None:
                contender.force(plan[i])
            with systems.quietly(), torch.no_grad(), contender.attached.context("c", i, 10, t):
                contender.call(**inputs)
            computed.append(bool(ran))
        assert computed == plan, (contender.system, contender.method)


@pytest.mark.parametrize("method", ["MagCache", "FirstBlock"])
def test_the_passes_alone_do_the_arithmetic_of_a_reused_step(method):
    """Otherwise they would bound nothing."""
    pytest.importorskip("diffusers")
    subject = models.MODELS["digits"](2, 10, 16, "cpu")
    made = {(c.system, c.method): c for c in catalogue.contenders(subject, "eager")}
    ours, least = made["fastcache", method], made[contenders.PASSES, method]
    plan = contenders.schedule(10)
    with torch.no_grad():
        for i, inputs in enumerate(subject.calls[:5]):
            with ours.attached.context("cond", i, 10, contenders.timestep(i, 10)):
                output = ours.call(**inputs)[0]
        assert plan[3:5] == [True, False]
        (state,) = ours.attached.cache.denoisers[0].pool.states.values()
        (unit,) = state.units[0].values()
        least.force(False)
        least.call(**inputs)
        (passes,) = (m for m in least.part.modules() if isinstance(m, contenders.Passes))
        passes.residual = unit.streams[0].views[0]
        assert torch.equal(least.call(**inputs)[0], output)


def test_own_cost_is_that_of_quiet_rounds():
    contender = contenders.Contender("fastcache", "MagCache", "", lambda: None)
    plan = contenders.schedule(10)
    for noise in (0.0, 0.0, 5.0, 9.0, 2.0, 0.0, 3.0, 0.0, 7.0, 1.0):
        mine = [100.0 if computed else 3.0 + noise for computed in plan]
        contender.pairs.append((mine, [1.0 + 3 * noise] * 10))
    assert contender.own() == [2.0] * plan.count(False)


@pytest.mark.parametrize("model", ["flux", "video", "dit"])
def test_quality_and_its_continuation(tmp_path, model):
    pytest.importorskip("diffusers")
    path = tmp_path / "quality.jsonl"
    rows = rows_of(quality.main, path, "--quick", "--model", model)
    assert {(r["model"], r["dtype"]) for r in rows} == {(model, "fp32")}
    assert {"uncached", "fastcache", "diffusers"} <= {r["system"] for r in rows}
    assert all(0 < r["compute"] <= 1 for r in rows if "error" not in r)
    assert not [r for r in rows if r["system"] == "fastcache" and "error" in r]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    again = rows_of(quality.main, path, "--quick", "--resume", "--model", model)
    assert again == [*rows[:-1], again[-1]]  # only the missing point was measured again
    assert again[-1]["psnr"] == rows[-1]["psnr"]


def test_interrupted_quality_has_written_what_it_measured(tmp_path, monkeypatch):
    """Also the uncached row, and behind the rows that the file had."""
    pytest.importorskip("diffusers")
    path, one = tmp_path / "quality.jsonl", ("--quick", "--method", "fewer steps", "--resume")
    nothing = dict.fromkeys((*split.KEY, "seeds", "steps", "guidance"))
    old = [{"bench": "quality", **nothing, "setting": str(i)} for i in range(3)]
    common.write_lines(path, old)
    measured, original = [], quality.Bench.row

    def row(*given):
        if measured:
            raise KeyboardInterrupt
        measured.append(original(*given))
        return measured[-1]

    monkeypatch.setattr(quality.Bench, "row", row)
    with pytest.raises(KeyboardInterrupt):
        quality.main([*one, "--json", str(path)])
    kept = common.read_lines(path)
    assert [r["setting"] for r in kept] == ["0", "1", "2", *(r["setting"] for r in measured)]
    assert kept[3]["method"] == "uncached"


def test_rows_of_another_model_or_dtype_are_another_cell(tmp_path):
    """Neither continues the other, and a row of before there were two is the shipped model in fp32."""
    pytest.importorskip("diffusers")
    path, one = tmp_path / "quality.jsonl", ("--quick", "--method", "fewer steps", "--resume")
    old = rows_of(quality.main, path, *one)
    for row in old:
        del row["model"], row["dtype"]
    common.write_lines(path, old)
    assert rows_of(quality.main, path, *one) == common.read_lines(path)
    rows_of(quality.main, path, *one, "--dtype", "bf16")
    rows_of(quality.main, path, *one, "--model", "video")
    rows = common.read_lines(path)
    assert [r["psnr"] for r in rows[: len(old)]] == [r["psnr"] for r in old]
    cells = dict(split.cells(rows))
    assert [c.title.split(",")[0] for c in cells] == ["8 steps", "bf16", "video"]
    assert all(len(part) == len(old) for part in cells.values())
    assert all(("psnr_fp32" in r) == (r["dtype"] == "bf16") for r in rows)
    titles = [b.text for b in report.blocks(rows) if b.kind == "h3" and "best PSNR" in b.text]
    assert len(titles) == len(cells)


def test_tune_with_guidance_and_other_warmups(tmp_path):
    pytest.importorskip("diffusers")
    some = ("--quick", "--solver", "euler", "--warmup", "1", "2", "--growth", "1.5")
    plain = rows_of(tune.main, tmp_path / "plain.jsonl", *some)
    guided = rows_of(tune.main, tmp_path / "guided.jsonl", *some, "--guidance", "sequential")
    names = [(r["solver"], r["recipe"]) for r in guided]
    assert names == [(r["solver"], r["recipe"]) for r in plain]
    assert {name for _, name in names} >= {
        "",
        "Taylor 2, growth 1.5",
        "Taylor 2, warm-up 1, growth 1.5",
    }
    assert {r["guidance"] for r in guided} == {"sequential"}
    assert all(a["psnr"] != b["psnr"] for a, b in zip(guided, plain, strict=True))


def test_settings_are_chosen_by_an_expression(tmp_path):
    pytest.importorskip("diffusers")
    rows = rows_of(
        quality.main, tmp_path / "q.jsonl", "--quick", "--setting", "^fastcache Interval"
    )
    assert [r["method"] for r in rows] == ["uncached", "Interval"]


def test_without_diffusers_the_benches_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(systems, "missing", lambda package: f"{package} is not installed")
    for main in (graphs.main, steps_bench.main, quality.main):
        assert main(["--quick"]) == 0
        assert "nothing can be measured" in capsys.readouterr().out


def test_traffic_counts_what_the_eager_decision_moves():
    """12 passes, 6 large launches and one read: the numbers that the fused kernel is held against."""
    y, x, prev = (torch.randn(64, 1024) for _ in range(3))
    with Traffic(small=y.nbytes // 16) as traffic:
        _, ratio = chains.decision({"y": y, "x": x, "prev": prev})
        ratio.item()
    assert (traffic.launches, traffic.bytes // y.nbytes, traffic.reads) == (6, 12, 1)


def test_quantiles_and_lines(tmp_path):
    assert common.quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == {"p20": 1.0, "p50": 3.0, "p80": 4.0}
    path = tmp_path / "new" / "rows.jsonl"
    common.write_lines(path, [{"a": float("inf"), "b": [float("nan"), 1]}])
    common.write_lines(path, [{"a": 2}], append=True)
    assert common.read_lines(path) == [{"a": None, "b": [None, 1]}, {"a": 2}]


def test_the_report_renders_and_notices_staleness(tmp_path, capsys):
    results = tmp_path / "results"
    shutil.copytree(report.RESULTS, results)
    assert report.results(results), "no committed results"
    readme = tmp_path / "README.md"
    readme.write_text("# hello\n<!-- bench:begin kernels -->\nold\n<!-- bench:end -->\nbye\n")
    place = ["--results", str(results), "--root", str(tmp_path)]
    assert report.main([*place, "--check"]) == 1
    assert report.main([*place, "--write"]) == 0
    assert report.main([*place, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# hello") and text.endswith("bye\n") and "old" not in text
    html = tmp_path / "out" / "all.html"
    assert report.main([*place, "--html", str(html)]) == 0
    page = html.read_text()
    assert 'src="data:image/svg+xml;base64,' in page and "http" not in page.split("<style>")[0]
    assert "FirstBlock" in page and "<details>" in page
    readme.write_text(text.replace("|---|", "|===|"))
    capsys.readouterr()
    assert report.main([*place, "--check"]) == 1
    assert "README.md" in capsys.readouterr().out
    readme.write_text(text.replace("bye", "bye bye"))  # what stands outside of the tables is free
    assert report.main([*place, "--check"]) == 0


def test_what_the_repository_shows_is_what_was_measured():
    """README and docs agree with bench/results."""
    assert report.main(["--check"]) == 0


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        snippets.fill("<!-- bench:begin nonsense -->\n<!-- bench:end -->", [])


def test_every_table_is_shown_somewhere():
    pages = " ".join(path.read_text() for path in report.marked(ROOT))
    assert all(f"<!-- bench:begin {name} -->" in pages for name in snippets.SNIPPETS)


def test_a_frontier_joins_what_no_cheaper_setting_beats():
    dots = [(25.0, 31.0), (25.1, 40.0), (30.0, 39.0), (40.0, 50.0)]
    assert quality_figures.best_line(dots) == [(25.1, 40.0), (40.0, 50.0)]


def test_claims_are_met_only_where_the_bound_is():
    cell = {"bench": "ops", "kind": "cpu", "op": "residual_l1 + store", "model": "FLUX"}
    cell |= {"dtype": "fp32", "shape": [4608, 3072], "of_copy": 0.9, "threads": 1, "device": "x"}
    rows = [
        {**cell, "contender": name, "p50": time}
        for name, time in (("diffusers", 3.9), ("compile", 2.0), ("compile out=", 0.9), ("C++", 1))
    ]
    verdicts = {c.text.split(",")[0]: c.met for c in claims.all_claims(rows)}
    assert verdicts["C++ residual_l1 + store over diffusers' eager chain"] is False
    assert verdicts["C++ residual_l1 + store over the faster torch.compile form"] is False
    assert verdicts["C++ residual_l1 + store"] is True


def test_the_list_of_benchmarks_is_complete(capsys):
    assert program.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in program.NAMES)
    assert program.main(["nonsense"]) == 2
