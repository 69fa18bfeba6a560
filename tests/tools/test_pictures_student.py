# SPDX-License-Identifier: Apache-2.0
"""The student of few steps: what it is taught, and that its training goes on where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))

import emoji  # noqa: E402

from bench import (  # noqa: E402
    common,
    few_steps,
    few_tables,
    quality,
    quality_figures,
    subjects,
    sweeps,
    training_tables,
    tune,
)
from bench.pictures import data, distill, train  # noqa: E402
from bench.pictures import model as pictures  # noqa: E402
from bench.pictures.student import Recipe, Runs, Student, distances, teach  # noqa: E402
from fastcache import presets  # noqa: E402
from fastcache.demo.model import save_weights  # noqa: E402

FIELDS = pictures.architecture(heads=1, double=1, single=1)
RECIPE = Recipe(batch=16, lr=3e-3, warmup=2, ema=0.9, levels=2, each=3, autocast=False)
PROMPTS = ("red apple", "blue heart", "yellow lemon")


def awake() -> torch.nn.Module:
    return emoji.awake(heads=1, double=1, single=1)


def lessons(teacher: torch.nn.Module, folder: Path, recipe: Recipe = RECIPE) -> Runs:
    return Runs(torch.cat(list(teach(teacher, PROMPTS, recipe, folder))), PROMPTS)


def student(runs: Runs) -> Student:
    torch.set_num_threads(1)
    return Student(FIELDS, RECIPE, copy.deepcopy(awake()), runs)


def test_runs_are_those_of_the_sampler(tmp_path):
    teacher = awake()
    runs = lessons(teacher, tmp_path)
    assert runs.latents.shape == (6, 3, pictures.IMAGE_TOKENS, pictures.CHANNELS)
    noise = torch.randn(6, 64, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(runs.latents[:, 0], noise.half())
    images = pictures.generate(
        teacher, torch.arange(6) % 3, steps=6, guidance=4.0, prompts=PROMPTS, seed=0
    )
    torch.testing.assert_close(
        pictures.unpack(runs.latents[:, 2].float()), images, atol=2e-2, rtol=2e-3
    )


def test_runs_are_kept(tmp_path, monkeypatch):
    first = lessons(awake(), tmp_path)
    monkeypatch.setattr(pictures, "denoise", None)
    assert torch.equal(lessons(awake(), tmp_path).latents, first.latents)


def test_lesson_is_the_mean_velocity_between_two_levels(tmp_path):
    """A model that answers with that velocity has no loss, at every level and for every run."""
    runs = lessons(awake(), tmp_path)
    taught = student(runs)
    asked = []

    def right(model, texts, here, sigma, labels):
        del model, texts
        asked.extend(sigma.tolist())
        level = ((1 - sigma) * RECIPE.levels).round().long()
        run = next(
            run
            for run in torch.cartesian_prod(*[torch.arange(2)] * len(labels))
            if torch.equal(runs.latents[run * 3 + labels, level].float(), here)
        )
        ahead = runs.latents[run * 3 + labels, level + 1].float()
        return (here - ahead) * RECIPE.levels

    taught.recipe = dataclasses.replace(RECIPE, batch=5)
    taught.denoise = right
    assert taught.loss().item() == pytest.approx(0, abs=1e-9)
    taught.recipe = RECIPE
    assert taught.held_out_loss(runs) == pytest.approx(0, abs=1e-9)
    assert set(asked) == {1.0, 0.5}


def test_student_comes_nearer_to_its_teacher(tmp_path):
    runs = lessons(awake(), tmp_path)
    taught = student(runs)
    before = taught.held_out_loss(runs)
    for _ in range(40):
        taught.step()
    assert taught.held_out_loss(runs) < 0.8 * before
    found = distances(awake(), taught.average.eval(), PROMPTS, RECIPE, steps=6)
    untaught = distances(awake(), awake(), PROMPTS, RECIPE, steps=6)
    assert found["student, 2 steps"] > untaught["student, 2 steps"] + 1
    assert found["teacher, 2 steps"] == untaught["teacher, 2 steps"]


def test_resumed_distillation_equals_uninterrupted(tmp_path):
    runs = lessons(awake(), tmp_path / "runs")
    whole, part, rest = (student(runs) for _ in range(3))
    for _ in range(4):
        whole.step()
    for _ in range(2):
        part.step()
    part.save(tmp_path / "state.pt")
    rest.resume(tmp_path / "state.pt")
    for _ in range(2):
        rest.step()
    assert rest.history.train == whole.history.train
    for a, b in zip(
        rest.average.state_dict().values(), whole.average.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_program_distils_goes_on_and_exports(tmp_path, monkeypatch):
    monkeypatch.setitem(pictures.HEADS, "2M", 1)
    monkeypatch.setattr(train, "EVERY", 2)
    monkeypatch.setattr(data, "HELD_OUT", 3)
    monkeypatch.setattr(distill, "PROMPTS", PROMPTS)
    monkeypatch.setattr(distill, "COMPARED", 6)
    teacher, results = tmp_path / "teacher.safetensors", tmp_path / "results.jsonl"
    save_weights(emoji.awake(heads=1), teacher)
    options = {
        "--data": emoji.archive(tmp_path / "package.tgz"), "--size": "2M", "--teacher": teacher,
        "--out": tmp_path, "--threads": 1, "--runs": 1,
    }  # fmt: skip
    arguments = [str(word) for pair in options.items() for word in pair]
    for steps in ("1", "2"):
        distill.main([*arguments, "--steps", steps])
    distill.main([*arguments, "--minutes", "0", "--export", str(tmp_path), "--json", str(results)])
    file = tmp_path / pictures.student_file("2M", 8)
    card = json.loads(file.with_suffix(".json").read_text())
    assert card["steps"] == 2
    assert card["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert card["teacher_sha256"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert set(card["psnr_to_teacher"]) == {"held-out prompts", "benchmark's prompts"}
    (row,) = common.read_lines(results)
    assert (row["bench"], row["size"]) == ("distilling", "2M")
    lines = training_tables.students([row]).splitlines()
    assert lines[0] == "| size |  | calls | held-out prompts | benchmark's prompts |"
    assert [line.split(" | ")[1:3] for line in lines[3:5]] == [
        ["student, 8 steps", "8"],
        ["teacher, 4 steps", "8"],
    ]
    pictures.load_model("2M", file)


def test_every_schedule_of_a_short_run():
    plans = list(few_steps.schedules(6))
    assert [1, 1, 0, 0, 1, 1] in plans
    assert [1, 1, 1, 0, 0, 1] in plans
    assert len({tuple(plan) for plan in plans}) == len(plans) == 4 + 6 + 4, "3 to 5 of 6"
    assert all(plan[:2] == [1, 1] for plan in plans)


def test_quality_measures_a_student_without_a_solution():
    subject = dataclasses.replace(
        subjects.SUBJECTS["pictures-student"](),
        load=lambda: emoji.awake(heads=1, double=1, single=2),
        steps=5,
    )
    cell = subjects.Cell("pictures-student", "fp32", 5, "none")
    bench = quality.Bench(subject, cell, 2)
    assert bench.solve() is None
    points = list(few_steps.short_points(cell, [1.0] * 5))
    rows = [bench.row(p, None) for p in points if p.method in ("Mask", "fewer steps")]
    assert [r["compute"] for r in rows[:3]] == [pytest.approx(n / 5) for n in (2, 3, 4)]
    assert len(rows) == 3 + 7 * len(few_steps.FORECASTS)
    assert all(r["psnr"] > 0 and r["psnr_solution"] is None for r in rows)
    assert {p.system for p in points} >= {"fastcache", "diffusers", "uncached"}


def test_presets_and_lite_mode_are_measured_with_both_halves_in_one_call():
    cell = subjects.Cell("pictures", "fp32", 28, "batched")
    output = subjects.SUBJECTS["pictures"]().output
    keys = {p.key for p in sweeps.points(cell, [1.0] * 28, output)}
    for row in (presets()[name] for name in ("quality", "balanced", "fast")):
        assert ("fastcache", "Guided", *row["point"]) in keys
    assert ("diffusers", "TaylorSeer", "order 1", "lite, every 4") in keys


def measured(system, predictor, setting, compute, psnr, steps=8):
    """A row of the quality benchmark."""
    method = "fewer steps" if system == "uncached" else "Mask"
    cell = subjects.Cell("pictures-student", "fp32", steps, "none")._asdict()
    key = {"system": system, "method": method, "predictor": predictor, "setting": setting}
    found = {"compute": compute, "psnr": psnr, "seeds": 2}
    return {"bench": "quality", "kind": "cpu", **cell, **key, **found}


def test_table_of_a_student_has_the_best_of_every_system():
    rows = [
        measured("uncached", "", "6 steps", 0.75, 30.0),
        measured("uncached", "", "5 steps", 0.625, 28.0),
        measured("fastcache", *few_tables.MASKS["mask/8"][1:], 0.752, 33.0),
        measured("fastcache", "reuse", "0 1 3 5 7", 0.626, 29.0),
        measured("diffusers", "order 1", "lite, every 3", 0.7, 31.5),
    ]
    lines = few_tables.few_steps(rows).splitlines()
    assert lines[3:5] == [
        "| 8 | 6 | 30.0 | 33.0 | 29.0 |  | 33.0 |  | 31.5 |  | Hermite 1 at 0 1 2 3 5 7 |",
        "| 8 | 5 | 28.0 | 29.0 | 29.0 |  |  |  |  |  | reuse at 0 1 3 5 7 |",
    ]
    assert few_tables.preset(rows).splitlines()[2:] == [
        '| `preset("mask/8")` | 0 1 2 3 5 7 | 33.0 | 30.0 |'
    ]
    for name, (steps, _, setting) in few_tables.MASKS.items():
        computed = [i for i, c in enumerate(presets()[name]["when"][1]["compute"]) if c]
        assert (steps, setting) == (presets()[name]["steps"], " ".join(map(str, computed)))


def test_legend_names_the_lines_of_every_panel():
    pytest.importorskip("matplotlib")
    rows = [
        measured("fastcache", "reuse", "0 1 3", 0.75, 29.0, steps=4),
        measured("uncached", "", "3 steps", 0.75, 30.0, steps=4),
        measured("fastcache", "order 1", "0 1 3 5", 0.5, 29.0),
        measured("diffusers", "order 1", "lite, every 3", 0.7, 31.5),
        measured("uncached", "", "6 steps", 0.75, 31.0),
        measured("fastcache", "reuse", "0 1 3 7", 0.5, 28.0, steps=16),
    ]
    figure = quality_figures.quality_figure(rows)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == 2, "a cell that was not swept gets no panel"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "fastcache, Taylor",
        "fastcache, plain reuse",
        "diffusers' hooks",
        "fewer steps, no cache",
    ]


def test_what_tune_says_of_few_steps(monkeypatch):
    subject = dataclasses.replace(
        subjects.SUBJECTS["pictures-student"](),
        load=lambda: emoji.awake(heads=1, double=1, single=2),
    )
    monkeypatch.setitem(tune.SUBJECTS, "pictures-student", lambda: subject)
    monkeypatch.setattr(tune, "FEW", ((2, 1.0),))
    (row,) = tune.few(tune.Bench("pictures-student", 1))
    assert row["said"]
    table = few_tables.said(
        [{**row, "bench": "tune", "part": "few", "model": "pictures-student", "kind": "cpu"}]
    )
    assert row["said"] in table
