# SPDX-License-Identifier: Apache-2.0
"""The picture model's data, text and training, on an archive and a model that are tiny."""

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

from bench import common as bench_common  # noqa: E402
from bench import (  # noqa: E402
    points,
    preset_tables,
    quality,
    quality_tables,
    subjects,
    sweeps,
    training_tables,
)
from bench.pictures import data, picture, train, words  # noqa: E402
from bench.pictures import model as pictures  # noqa: E402
from bench.pictures.training import Recipe, Trainer, learning_rate  # noqa: E402

FIELDS = pictures.architecture(heads=1, double=1, single=1)
RECIPE = Recipe(batch=4, warmup=2, flat=3, autocast=False)


@pytest.fixture
def splits(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 3)
    return data.load_pictures(emoji.archive(tmp_path / "package.tgz"))


def trainer(splits) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(FIELDS, RECIPE, splits[0])


def bits(of: Trainer) -> list[torch.Tensor]:
    return [*of.model.state_dict().values(), *of.average.state_dict().values()]


def test_pictures_are_on_white_and_named(splits):
    both = dict(
        zip(
            splits[0].prompts + splits[1].prompts,
            torch.cat([s.images for s in splits]),
            strict=True,
        )
    )
    assert len(both) == emoji.COUNT - 1, "without the component"
    first = both["food fruit no 0"]
    assert first.shape == (3, data.IMAGE_SIZE, data.IMAGE_SIZE)
    half = data.IMAGE_SIZE // 2
    assert torch.equal(
        first[:, :, :half], torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 32, half)
    )
    assert (first[:, :, half:] == 1).all()
    assert (both["food fruit no 1"] == torch.tensor([-1.0, -1, 1])[:, None, None]).all()


def test_archive_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm pack"):
        data.load_pictures(tmp_path / "absent.tgz")
    with pytest.raises(ValueError, match=r"1\.2\.3"):
        data.load_pictures(emoji.archive(tmp_path / "old.tgz", "1.2.3"))


def test_words():
    assert words.words("Food-fruit: the RED apple, and a red food") == (
        "food",
        "fruit",
        "red",
        "apple",
    )
    assert len(words.words("one two three four five six seven")) == words.TEXT_TOKENS
    text, pooled = words.table(["red apple", "apple red"])
    assert text.shape == (3, 6, words.TEXT_DIM)
    assert torch.equal(text[0, 0], text[1, 1])
    assert not torch.equal(text[0, 0], text[0, 1])
    torch.testing.assert_close(pooled[0], text[0, :2].sum(0) / 2**0.5)
    assert not text[:2, 2:].any()
    assert not text[words.NULL].any()
    assert not pooled[words.NULL].any()
    # a word's vector belongs to the trained weights: another one would be another word
    assert words.vector("red")[:2].tolist() == pytest.approx([0.05197, -0.82634], abs=1e-4)


def test_pack_is_one_token_a_patch():
    images = torch.randn(2, 3, 32, 32)
    tokens = pictures.pack(images)
    assert torch.equal(tokens[1, 8 + 2], images[1, :, 4:8, 8:12].flatten())
    assert torch.equal(pictures.unpack(tokens), images)
    assert pictures.position_ids()[0][8 + 2].tolist() == [0, 1, 2]


def test_guidance_uses_the_null_prompt():
    model = pictures.build_model(FIELDS).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    labels, prompts = torch.tensor([0, 1]), ["red apple", "blue heart"]
    options = {"steps": 2, "prompts": prompts}
    plain = pictures.generate(model, labels, **options)
    torch.testing.assert_close(pictures.generate(model, labels, guidance=1.0, **options), plain)
    null = pictures.generate(model, torch.tensor([-1, -1]), **options)
    torch.testing.assert_close(pictures.generate(model, labels, guidance=0.0, **options), null)
    both = pictures.generate(model, labels, guidance=4.0, **options)
    batched = pictures.generate(model, labels, guidance=4.0, batched_guidance=True, **options)
    torch.testing.assert_close(both, batched, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, plain, atol=1e-3)


def test_resumed_training_equals_uninterrupted(splits, tmp_path):
    whole = trainer(splits)
    for _ in range(6):
        whole.step()
    part = trainer(splits)
    for _ in range(3):
        part.step()
    part.held_out_loss(splits[1])
    part.save(tmp_path / "state.pt")
    rest = trainer(splits)
    rest.resume(tmp_path / "state.pt")
    assert rest.steps == 3
    for _ in range(3):
        rest.step()
    assert rest.history.train == whole.history.train
    assert all(torch.equal(a, b) for a, b in zip(bits(rest), bits(whole), strict=True))
    other = Trainer(FIELDS, Recipe(batch=5), splits[0])
    with pytest.raises(ValueError, match="recipe"):
        other.resume(tmp_path / "state.pt")


def test_learning_rate_has_no_end():
    rates = [learning_rate(RECIPE, s) / RECIPE.lr for s in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[11] == pytest.approx(0.5)


def test_program_trains_goes_on_and_exports(splits, tmp_path, monkeypatch):
    monkeypatch.setitem(pictures.HEADS, "2M", 1)
    monkeypatch.setattr(train, "EVERY", 2)
    out, assets = tmp_path / "out", tmp_path / "assets"
    assets.mkdir()
    common = [
        "--data",
        str(tmp_path / "package.tgz"),
        "--size",
        "2M",
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    train.main([*common, "--steps", "2"])
    train.main([*common, "--steps", "4"])
    written = (out / "2M" / "state.pt").stat().st_mtime_ns
    results = tmp_path / "results.jsonl"
    for _ in range(2):  # the second row takes the first one's place
        train.main([*common, "--minutes", "0", "--export", str(assets), "--json", str(results)])
    assert (out / "2M" / "state.pt").stat().st_mtime_ns == written, "only exported"
    assert {p.name for p in (out / "2M").iterdir()} >= {
        "state.pt",
        "loss_curve.png",
        "samples-0k.png",
    }
    record = json.loads((assets / "flux_pictures_2m.json").read_text())
    assert record["steps"] == 4
    assert [step for step, _ in record["history"]["held_out"]] == [2, 4]
    model = pictures.load_model("2M", assets / pictures.file_of("2M"))
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    weights = (assets / pictures.file_of("2M")).read_bytes()
    assert record["sha256"] == hashlib.sha256(weights).hexdigest()
    (row,) = bench_common.read_lines(results)
    assert {k: row[k] for k in ("size", "steps", "sha256")} == {
        "size": "2M",
        "steps": 4,
        "sha256": record["sha256"],
    }
    assert [step for step, _ in row["history"]["train"]] == [1, 2, 3, 4]
    larger = copy.deepcopy(row) | {"size": "7M"}
    larger["history"]["held_out"] = [[2, 0.5], [4, 0.25], [6, 0.375]]
    table = training_tables.losses([row, larger]).splitlines()
    assert "held out, step 4" in table[0], "the last that both have seen"
    assert "| 0.250 | 0.250 (step 4) |" in table[3]
    labels = training_tables.loss_figure([row, larger]).axes[0].get_legend_handles_labels()[1]
    assert labels[::2] == ["2M, training", "7M, training"]


def test_committed_card_is_that_of_the_committed_weights():
    card = json.loads((pictures.ASSETS / "flux_pictures_7m.json").read_text())
    weights = pictures.ASSETS / pictures.file_of("7M")
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert card["architecture"] == json.loads(
        json.dumps(pictures.architecture(pictures.HEADS["7M"]))
    )
    images = pictures.generate(pictures.load_model(), torch.tensor([7]), steps=6)
    heart, corner = images[0, :, 16, 16], images[0, :, 1, 1]
    assert heart[2] > heart[0] + 0.5, "a blue heart"
    assert (corner > 0.7).all(), "on white"


def awake() -> torch.nn.Module:
    return emoji.awake(heads=1, double=1, single=2)


def test_quality_measures_pictures_with_and_without_guidance():
    subject = dataclasses.replace(subjects.SUBJECTS["pictures"](), load=awake)
    found = {}
    for guidance in ("none", "sequential"):
        cell = subjects.Cell("pictures", "fp32", 5, guidance)
        bench = quality.Bench(subject, cell, 2)
        assert bench.scale == (None if guidance == "none" else 4.0)
        fewer = points.Point("uncached", "fewer steps", "", "3 steps", None, 3)
        rows = [bench.row(p, bench.reference) for p in (fewer, *sweeps.growing_points(5))]
        assert not any(r.get("error") for r in rows)
        assert all(r["accuracy"] is None for r in rows)
        assert rows[0]["compute"] == pytest.approx(0.6)
        found[guidance] = bench.reference
        quality.show([{**r, "bench": "quality"} for r in rows])
    assert not torch.allclose(found["none"], found["sequential"])


def test_growing_gaps():
    for most, computed in (
        (4, [0, 1, 2, 3, 5, 8, 12, 16, 20, 24]),
        (2, [0, 1, 2, *range(3, 28, 2)]),
    ):
        plan = sweeps.growing(28, most)
        assert [i for i, c in enumerate(plan) if c] == computed
    assert sweeps.growing(3, 4) == [1, 1, 1]


def test_picture_has_a_line_for_every_cost():
    model = awake()
    lines = picture.LINES[::2]
    before = picture.samples(model, 2)
    figure = picture.draw(model, lines)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[:2] == ["uncached, 28 steps"] * 2
    assert titles[2].startswith("2x: cached, 14 of 28 computed: ")
    assert titles[5].startswith("4x: 7 steps, uncached: ")
    assert all(len(line.computed) == round(28 / line.factor) for line in picture.LINES)
    assert figure.axes[2].images[0].get_array().shape == (32, 32 * len(picture.SHOWN), 3)
    assert torch.equal(picture.samples(model, 2), before), "the cache is gone again"


def test_table_of_named_settings_has_leads_over_fewer_steps():
    def row(model, guidance, key, compute, psnr, **more):
        head = dict(zip(("system", "method", "predictor", "setting"), key, strict=True))
        cell = {"bench": "quality", "kind": "cpu", "model": model, "dtype": "fp32", "steps": 28}
        return {**cell, "guidance": guidance, **head, "compute": compute, "psnr": psnr, **more}

    fast = quality_tables.NAMED['`preset("fast")`']
    rows = [
        row(model, guidance, key, compute, psnr)
        for model, guidance in (("flux", "none"), ("pictures", "sequential"))
        for key, compute, psnr in (
            (("uncached", "fewer steps", "", "7 steps"), 0.25, 20.0),
            (("uncached", "fewer steps", "", "14 steps"), 0.5, 30.0),
            (fast, 0.35, 31.0 if model == "flux" else 23.0),
        )
    ]
    rows.append(
        row(
            "pictures",
            "sequential",
            quality_tables.NAMED['`preset("quality")`'],
            1.0,
            None,
            error="none",
        )
    )
    lite = quality_tables.NAMED["diffusers' lite mode, every 4th"]
    rows += [
        row("flux", "none", lite, 0.354, 30.0),
        row("flux", "none", ("diffusers", "MagCache", "reuse", "0.06"), 0.36, 40.0),
        row("pictures", "sequential", lite, 0.3, 23.5),
    ]
    longer = [{**r, "model": "pictures", "steps": 50} for r in rows if r["model"] == "flux"]
    assert (
        quality_tables.elsewhere(longer).splitlines()[0] == "|  | compute | 50 steps, no guidance |"
    )
    found = preset_tables.elsewhere(longer).splitlines()[2:]
    assert found[0] == '| `preset("fast")` | diffusers\' hooks | +1.0 | **+1.0** |'
    peers = preset_tables.peers(rows).splitlines()
    assert peers[2:] == [
        '| `preset("fast")` | diffusers\' hooks | +1.0 | -0.5 | **-0.5** |',
        '| `preset("fast")` | fewer steps | +11.0 | +3.0 | **+3.0** |',
    ], "of what costs no more"
    assert preset_tables.ranks(rows).splitlines()[2:] == [
        '| `preset("fast")` | 1 | 2 | 1 to 2 |',
        "| diffusers' lite mode, every 4th | 2 | 1 | 1 to 2 |",
    ]
    leads = preset_tables.smallest(rows).splitlines()
    assert leads[2] == "| 25% |  |  |  |", "nothing of ours is so cheap"
    assert leads[4] == "| 35% | -0.5 (pictures, guidance) |  | +3.0 (pictures, guidance) |"
    table = quality_tables.named(rows[:-3]).splitlines()
    assert table[0] == "|  | compute | flux, no guidance | pictures, guidance |"
    assert table[2:] == ['| `preset("fast")` | 35% | 31.0 (+7.0) | 23.0 (-1.0) |']
