# SPDX-License-Identifier: Apache-2.0
"""The digit models of the benchmarks: weights, cards, training, and what is measured on them."""

from __future__ import annotations

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

pytest.importorskip("diffusers")

from bench import (  # noqa: E402
    dit,
    preset_sweeps,
    preset_tables,
    quality,
    subjects,
    sweeps,
    train_dit,
    train_video,
    trainer,
    video,
)
from fastcache.demo.data import NULL_LABEL, load_digits  # noqa: E402
from fastcache.demo.model import load_judge  # noqa: E402
from fastcache.demo.train import held_out_loss  # noqa: E402

TRAINED = {"video": train_video, "dit": train_dit}
TRAINEES = (train_video.VIDEO, train_dit.DIT)


@pytest.mark.parametrize("trainee", TRAINEES, ids=list(TRAINED))
def test_the_committed_model_loads_and_is_what_its_card_says(trainee):
    weights, card = (trainee.folder / file for file in trainee.files)
    record = json.loads(card.read_text())
    assert weights.stat().st_size <= 3e6
    assert record["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {k: record[k] for k in trainer.LICENCES} == trainer.LICENCES
    assert record["architecture"] == json.loads(json.dumps(trainee.architecture))
    model, held_out = trainee.load(weights), load_digits()[1]
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    loss = held_out_loss(model, held_out, repeats=1, task=trainee.task)
    assert loss == pytest.approx(record["held_out_loss"], abs=0.01)  # one draw a sample, not four
    labels = torch.arange(10)
    recorded = record["samples"]["guided"]
    samples = trainee.generate(model, labels, steps=14, guidance=recorded["guidance"])
    assert samples.shape[0] == 10 and samples.shape[-2:] == (16, 16)
    for name, share in trainee.judged(load_judge(), samples, labels).items():
        assert recorded[name] > 0.9 and share >= recorded[name] - 0.15
    falling = [loss for _, loss in record["history"]["held_out"]]
    assert len(falling) >= 10 and falling[-1] < falling[0]


@pytest.mark.parametrize("name", TRAINED)
def test_training_writes_what_loads_and_the_same_twice(tmp_path, capsys, name):
    module, trainee = TRAINED[name], TRAINEES[list(TRAINED).index(name)]
    picture, arguments = (
        tmp_path / "samples.png",
        ["--steps", "4", "--batch", "8", "--samples", "2"],
    )
    module.main([*arguments, "--out", str(tmp_path), "--picture", str(picture)])
    assert "training loss" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    weights, card = (tmp_path / file for file in trainee.files)
    first = json.loads(card.read_text())
    trainee.load(weights)
    module.main([*arguments, "--out", str(tmp_path)])
    again = json.loads(card.read_text())
    assert again["sha256"] == first["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert again["history"] == first["history"]


def test_videos_move_and_their_packing_round_trips():
    images = load_digits()[1].images[:8]
    videos = video.animate(images, torch.Generator().manual_seed(0))
    assert videos.shape == (8, video.FRAMES, 1, 16, 16)
    assert (videos[:, 0] - videos[:, -1]).abs().amax((1, 2, 3)).min() > 0.1
    assert torch.equal(video.unpack(video.pack(videos)), videos)
    # wherever a digit is, the judge sees it in the middle
    still = video.centred(videos.flatten(0, 1)).unflatten(0, (8, -1))
    assert (still - still[:, :1]).abs().mean() < 0.1


def awake() -> torch.nn.Module:
    """A DiT that does something without having learnt it."""
    model = dit.build_model().eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model.requires_grad_(False)


def test_a_dit_sees_its_time_and_its_label_and_drops_none_by_itself():
    model, labels = awake().train(), torch.tensor([3, NULL_LABEL])
    latents, sigma = torch.randn(2, 1, 16, 16), torch.tensor([0.31, 0.62])
    found = dit.denoise(model, latents, sigma, labels)
    assert found.shape == latents.shape
    assert torch.equal(found, dit.denoise(model, latents, sigma, labels))
    for other in (
        dit.denoise(
            model, latents, sigma + 1e-4, labels
        ),  # a tenth of a timestep is not rounded off
        dit.denoise(model, latents, sigma, torch.tensor([4, 5])),
    ):
        assert ((found - other).abs().amax((1, 2, 3)) > 1e-6).all()
    zero = dit.build_model()
    assert not dit.denoise(zero, latents, sigma, labels).any(), "starts from nothing"


@pytest.mark.parametrize("guidance", ["none", "batched"])
def test_quality_measures_a_dit(guidance):
    subject = dataclasses.replace(subjects.SUBJECTS["dit"](), load=awake)
    cell = subjects.Cell("dit", "fp32", 8, guidance)
    bench = quality.Bench(subject, cell, 2)
    assert bench.scale == (None if guidance == "none" else 4.0)
    points = {p.key: p for p in sweeps.points(cell, [1.0] * 8, subject.output)}
    firsts = {key[:3]: key for key in points if key[0] != "diffusers"}
    rows = [bench.row(points[key], bench.reference) for key in firsts.values()]
    assert not [r["error"] for r in rows if r.get("error")]
    assert all(0 < r["compute"] <= 1 for r in rows) and min(r["compute"] for r in rows) < 0.6


def test_the_lite_mode_that_diffusers_is_given_on_a_dit_forecasts_its_output():
    """Its own leaves the blocks out and forecasts nothing: no projection is called as it expects."""
    subject = dataclasses.replace(subjects.SUBJECTS["dit"](), load=awake)
    found = {}
    for model in ("dit", "flux"):  # as spelled out for a DiT, and as it comes
        cell = subjects.Cell(model, "fp32", 8, "none")
        bench = quality.Bench(subject, cell, 2)
        for point in sweeps.points(cell, [1.0] * 8, subject.output):
            if point.key[1:] == ("TaylorSeer", "order 1", "lite, every 3"):
                found[model, point.system] = bench.row(point, bench.reference)["psnr"]
    ours = found["flux", "fastcache"]
    assert found["dit", "diffusers"] == pytest.approx(ours, abs=0.01)
    assert found["dit", "fastcache"] == pytest.approx(ours, abs=0.01)
    assert found["flux", "diffusers"] != pytest.approx(ours, abs=1)


def test_a_preset_for_fifty_steps_stands_beside_the_usual_run():
    def row(steps, method, setting, compute, solution, guidance="none"):
        cell = {"bench": "quality", "kind": "cpu", "model": "flux", "dtype": "fp32"}
        key = {"system": "fastcache", "method": method, "predictor": "", "setting": setting}
        measured = {"compute": compute, "psnr": 1.0, "psnr_solution": solution}
        return {**cell, "steps": steps, "guidance": guidance, **key, **measured}

    own = row(50, "Guided", "preset converged/50", 0.28, 44.25)
    whole = [row(28, "uncached", "28 steps", 1.0, 40.0), row(50, "uncached", "50 steps", 1.0, 50.0)]
    table = preset_tables.converged([own, *whole]).splitlines()
    assert table[2:] == ["| flux, no guidance | 40.0 | 44.2 | **+4.2** | 50% | 50.0 |"]
    assert preset_tables.converged([own, whole[0]]) == "", "nothing to hold it against"
    points = {p.key[3] for p in preset_sweeps.longer_points(50)}
    assert points == {"preset converged/50"} and not list(preset_sweeps.longer_points(28))
