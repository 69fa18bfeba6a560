# SPDX-License-Identifier: Apache-2.0
"""The shipped trained model: its data, its record, its training script and its sampler."""

from __future__ import annotations

import json
import socket
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from fastcache.demo import data, metrics, model, require, run, sample, train

SMALL = train.Recipe(steps=12, batch=16)


@pytest.fixture(scope="module")
def digits() -> tuple[data.Digits, data.Digits]:
    return data.load_digits()


@pytest.fixture(scope="module")
def denoiser() -> torch.nn.Module:
    return model.load_model()


@pytest.fixture(scope="module")
def judge() -> model.Judge:
    return model.load_judge()


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((model.ASSETS / model.RECORD_FILE).read_text())


def labels_of(count: int) -> torch.Tensor:
    return torch.arange(count) % data.NUM_CLASSES


def test_packing_round_trips_in_flux_order(digits):
    images = digits[1].images[:5]
    tokens = data.pack(images)
    assert tokens.shape == (5, 64, 4)
    assert torch.equal(data.unpack(tokens), images)
    # token 9 is row 1, column 1: the 2x2 patch that starts at pixel (2, 2)
    assert torch.equal(tokens[:, 9].reshape(5, 2, 2), images[:, 0, 2:4, 2:4])


def test_split_is_fixed_and_in_range(digits):
    again = data.load_digits()
    for split, same in zip(digits, again, strict=True):
        assert torch.equal(split.images, same.images) and torch.equal(split.labels, same.labels)
        assert split.images.min() == -1 and split.images.max() == 1
    assert [len(split) for split in digits] == [1500, 297]


def test_every_label_has_its_own_encoding():
    text, pooled = data.encode_labels(torch.arange(data.NULL_LABEL + 1))
    assert text.shape == (11, 4, 16) and pooled.shape == (11, 16)
    assert len(text.flatten(1).unique(dim=0)) == len(pooled.unique(dim=0)) == 11
    assert len(text[0].unique(dim=0)) == 4


def test_shipped_model_loads_without_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the demo model must not touch the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = model.load_model()
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.parameters())


def test_shipped_files_are_small():
    assert (model.ASSETS / model.MODEL_FILE).stat().st_size <= 4e6
    assert (model.ASSETS / model.JUDGE_FILE).stat().st_size <= 4e5


def test_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fastcache\.demo\.train"):
        model.load_model(tmp_path / "none.safetensors")


def test_missing_extra_says_what_to_install():
    with pytest.raises(ImportError, match=r"no_such_module.*fastcache-dit\[demo\]"):
        require("torch", "no_such_module")


def test_held_out_loss_matches_the_record(denoiser, digits, record):
    assert record["held_out_loss"] < 0.19
    loss = train.held_out_loss(denoiser, digits[1], repeats=1)
    # one draw per image instead of four
    assert loss == pytest.approx(record["held_out_loss"], abs=0.012)


def test_judge_matches_the_record(judge, digits, record):
    measured = metrics.accuracy(judge, digits[1].images, digits[1].labels)
    assert measured >= 0.99
    assert measured == pytest.approx(record["judge_accuracy"], abs=0.004)


@pytest.mark.parametrize("kind, floor", [("unguided", 0.95), ("guided", 0.99)])
def test_samples_match_the_record(denoiser, judge, record, kind, floor):
    recorded = record["samples"][kind]
    assert recorded["accuracy"] >= floor
    labels = labels_of(20)
    images = sample.generate(denoiser, labels, steps=14, guidance=recorded["guidance"])
    assert metrics.accuracy(judge, images, labels) >= floor - 0.05


def test_generation_is_a_function_of_the_seed(denoiser):
    labels = labels_of(3)
    first = sample.generate(denoiser, labels, steps=3, seed=1)
    assert first.shape == (3, 1, 16, 16)
    assert torch.equal(first, sample.generate(denoiser, labels, steps=3, seed=1))
    assert not torch.equal(first, sample.generate(denoiser, labels, steps=3, seed=2))


def test_batched_guidance_equals_sequential(denoiser):
    labels = labels_of(3)
    images = [
        sample.generate(denoiser, labels, steps=3, guidance=2.5, batched_guidance=batched)
        for batched in (False, True)
    ]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, ["cond"]),
        ({"guidance": 2.5}, ["cond", "uncond"]),
        ({"guidance": 2.5, "batched_guidance": True}, ["cond_uncond"]),
    ],
)
def test_every_call_is_named_by_its_context(denoiser, options, names):
    cache = RecordingCache()
    sample.generate(denoiser, labels_of(2), steps=2, cache=cache, **options)
    expected = [
        (name, {"step_index": i, "num_inference_steps": 2, "timestep": t, "sigma": t / 1000})
        for i, t in enumerate((1000.0, 500.0))
        for name in names
    ]
    assert cache.calls == expected


class RecordingCache:
    """Stands in for a cache and notes the contexts that were opened."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    @contextmanager
    def context(self, name, **step):
        self.calls.append((name, step))
        yield


def test_training_is_deterministic_and_lowers_the_loss(digits):
    (first, history), (second, again) = (train.train_denoiser(SMALL, digits[0]) for _ in range(2))
    assert history.train == again.train
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(history.train[-3:]) < sum(history.train[:3])


def test_training_starts_at_the_identity():
    """With modulation and output at zero the untrained model predicts exactly zero."""
    untrained = model.build_model()
    tokens = sample.initial_noise(2, seed=0)
    with torch.no_grad():
        out = model.denoise(untrained, tokens, torch.tensor([0.3, 0.9]), labels_of(2))
    assert not out.any()


def test_training_script_writes_what_the_package_loads(tmp_path, capsys):
    arguments = ["--steps", "8", "--judge-epochs", "1", "--samples", "4", "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    assert "fell" in capsys.readouterr().out
    model.load_model(tmp_path / model.MODEL_FILE)
    model.load_judge(tmp_path / model.JUDGE_FILE)
    written = json.loads((tmp_path / model.RECORD_FILE).read_text())
    assert written["recipe"]["steps"] == len(written["history"]["train"]) == 8
    assert (tmp_path / train.CURVE_FILE).stat().st_size > 1000


def test_learning_rate_warms_up_and_ends_at_two_percent():
    recipe = train.Recipe()
    rates = [train.learning_rate(recipe, step) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(recipe.lr / 100)
    assert max(rates) == rates[99] == recipe.lr
    assert rates[-1] == pytest.approx(0.02 * recipe.lr, rel=1e-2)


def test_metrics_at_their_ends(judge, digits):
    images = digits[1].images[:120]
    assert metrics.psnr(images, images) == float("inf")
    assert metrics.psnr(images + 0.2, images) == pytest.approx(20.0, abs=1e-4)
    assert metrics.relative_l2(1.5 * images, images) == pytest.approx(0.5)
    assert metrics.ssim(images, images) == pytest.approx(1.0)
    assert metrics.frechet(judge, images, images) == pytest.approx(0.0, abs=1e-3)
    assert metrics.frechet(judge, -images, images) > 1.0


def test_equal_compute_interpolates_between_measured_step_counts():
    curve = {7: 35.0, 14: 42.0}
    assert run.interpolate(curve, 8) == pytest.approx(36.0)
    assert run.interpolate(curve, 14) == 42.0
    assert run.interpolate(curve, 5) is None


def test_demo_writes_table_numbers_and_picture(tmp_path, capsys):
    numbers = tmp_path / "demo.json"
    arguments = ["--steps", "20", "--batch", "2", "--rounds", "2", "--json", str(numbers)]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert run.PICTURE_FILE in printed and str(numbers) in printed
    assert (tmp_path / run.PICTURE_FILE).stat().st_size > 10_000
    written = json.loads(numbers.read_text())
    rows, nearer = written["rows"], written["nearer"]
    assert f"{nearer['cached']:.1f} with {nearer['cached_steps']} second-order steps" in printed
    assert nearer["steps"] == 20 and 25 < nearer["usual"] < 60 and 0.2 < nearer["share"] < 1
    assert not [row["name"] for row in rows if row["name"] not in printed]
    assert "…" not in printed
    uncached = rows[0]
    assert uncached["psnr"] is None and uncached["compute"] == 1
    assert uncached["blocks"] == [10] * 20
    cached = [row for row in rows if row["predictor"]]
    assert all(row["steps"] == 20 for row in cached)
    # rows that skip modules inside blocks run every block
    assert all((row["compute"] < 1) == (row["computed_steps"] < 20) for row in cached)
