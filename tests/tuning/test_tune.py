# SPDX-License-Identifier: Apache-2.0
"""fastcache.tune on a flow of known cost and error."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tuning_world import Flow, Ticks, clock, fingerprint, generation, tuned

import fastcache
from fastcache import FastcacheWarning, Recipe, Tuning

__all__ = ["clock"]
pytestmark = pytest.mark.usefixtures("clock")


def plain(found: Tuning) -> list:
    return [r for r in found.rows if r.recipe is None]


def test_the_nearest_run_at_a_wished_speed(tmp_path):
    model = Flow()
    before = fingerprint(model)
    found = tuned(model, speedup=2)
    assert fingerprint(model) == before
    best = found.rows[0]
    assert found.best is not None and found.best == best.recipe
    assert best.speedup >= 1.98 and best.seeds == (0, 1) and best.steps == found.num_inference_steps
    fewer = max(r.psnr for r in plain(found) if r.speedup >= 1.9)
    assert best.psnr > fewer + 3
    # what a row says is what a run with its recipe gives
    generate = generation(model)
    errors = []
    for seed in (0, 1):
        wanted = generate(fastcache.tuning.generation.NoCache(), 16, seed)
        with fastcache.enable(model, found.best) as cache:
            start = Ticks.now
            made = generate(cache, 16, seed)
            spent = Ticks.now - start
        peaks = wanted.double().flatten(1).amax(1) - wanted.double().flatten(1).amin(1)
        errors += (
            20 * peaks.log10() - 10 * (made - wanted).double().square().flatten(1).mean(1).log10()
        ).tolist()
    assert best.psnr == pytest.approx(np.mean(errors), abs=1e-6)
    assert 1 / best.speedup == pytest.approx(spent / (16 * 4.125), rel=0.02)
    met = [r.psnr for r in found.rows[1:] if r.speedup >= 2]
    assert met == sorted(met, reverse=True)


def test_the_fastest_run_within_a_wished_error():
    found = tuned(Flow(), error=45)
    best = found.rows[0]
    assert found.best is not None and best.psnr >= 45
    assert best.speedup > max(r.speedup for r in plain(found) if r.psnr >= 45)
    assert not [
        r
        for r in found.rows
        if r.seeds == (0, 1) and r.psnr >= 45 and r.speedup > best.speedup * 1.001
    ]


def test_other_step_counts_and_a_converged_reference():
    found = tuned(Flow(), speedup=2, steps=(16, 24), reference="converged")
    usual = next(r for r in plain(found) if r.steps == 16)
    assert found.rows[0].psnr > usual.psnr and math.isfinite(usual.psnr)
    assert {r.steps for r in found.rows if r.recipe is not None} == {16, 24}
    assert found.evidence["reference_steps"] == 200 and "200 steps" in found.wish


def test_any_steps_are_around_the_default_that_generate_declares():
    found = tuned(Flow(), speedup=2, steps="any")
    assert found.evidence["steps"] == [16, 8, 12, 22, 29]


def test_it_says_where_caching_does_not_pay():
    found = tuned(Flow(turning=0.0, straight=True), speedup=2)
    assert found.best is None and found.num_inference_steps <= 8
    assert "Caching does not pay here" in str(found)
    student = tuned(Flow(turning=0.0, straight=True), speedup=1.5, steps=4)
    assert student.best is None and student.num_inference_steps < 4


def test_a_wish_that_nothing_meets_is_said():
    found = tuned(Flow(), speedup=40)
    assert "Nothing that was tried is as was wished" in found.verdict


def test_the_table_names_columns_and_runs_without_a_cache():
    text = str(tuned(Flow(), speedup=2))
    assert "speed-up" in text and "PSNR dB" in text and "no cache" in text and "Take " in text


# --- files -------------------------------------------------------------------------------------------------


def test_a_saved_tuning_is_a_recipe_file_with_its_evidence(tmp_path):
    model = Flow()
    found = tuned(model, speedup=2)
    path = found.save(tmp_path / "tuned.json")
    again = Tuning.load(path)
    assert (again.best, again.num_inference_steps) == (found.best, found.num_inference_steps)
    assert [r.recipe for r in again.rows] == [r.recipe for r in found.rows] and str(again) == str(
        found
    )
    assert Recipe.load(path) == found.best and again.evidence == found.evidence
    held = json.loads(path.read_text())["tuning"]["evidence"]
    for name in ("model", "scheduler", "steps", "size", "dtype", "seeds", "versions"):
        assert name in held
    with fastcache.enable(model, path) as cache:
        assert cache.recipe == found.best
    assert found.plot(tmp_path / "tuned.png").stat().st_size > 1000


def test_a_file_without_a_cache_computes_every_step(tmp_path):
    model = Flow(turning=0.0, straight=True)
    path = tuned(model, speedup=2).save(tmp_path / "none.json")
    assert Tuning.load(path).best is None
    with fastcache.enable(model, path) as cache:
        generation(model)(cache, 8)
        assert cache.stats.reused == 0


@pytest.mark.filterwarnings("error::fastcache.FastcacheWarning")
def test_use_on_another_model_or_step_count_is_said_by_name(tmp_path):
    model = Flow()
    path = tuned(model, speedup=2).save(tmp_path / "tuned.json")
    with fastcache.enable(model, path) as cache:
        generation(model)(cache, 16)
    with (
        fastcache.enable(model, path) as cache,
        pytest.warns(FastcacheWarning, match="steps 16, not for 20"),
    ):
        generation(model)(cache, 20)
        cache.reset()

    class Other(Flow):
        pass

    with pytest.warns(FastcacheWarning, match="model Flow, not for Other"):
        fastcache.enable(Other(), path).disable()


def test_a_file_that_is_no_tuning_is_refused(tmp_path):
    path = tuned(Flow(), speedup=2).save(tmp_path / "tuned.json")
    good = json.loads(path.read_text())

    def changed(where, value):
        held = json.loads(json.dumps(good))
        at = held
        for key in where[:-1]:
            at = at[key]
        at[where[-1]] = value
        path.write_text(json.dumps(held))
        return path

    for where, value in (
        (("tuning",), 3), (("tuning", "rows"), {}), (("tuning", "rows", 0), []), (("tuning", "cached"), 1),
        (("tuning", "rows", 0, "steps"), "s3cret"), (("tuning", "rows", 0, "psnr"), "s3cret"),
        (("tuning", "rows", 0, "seeds"), [None]), (("tuning", "rows", 0, "speedup"), True),
        (("tuning", "num_inference_steps"), None), (("made_for",), []), (("made_for", "steps"), -1),
        (("made_for", "model"), 7), (("tuning", "evidence"), []), (("tuning", "rows", 0, "recipe"), {"rules": 1}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="recipe") as caught:
            Tuning.load(changed(where, value))
        assert "s3cret" not in str(caught.value)
    with pytest.raises(ValueError, match="tuning"):
        Tuning.load(Recipe(fastcache.Interval(2)).save(tmp_path / "recipe.json"))


def test_pictures_of_every_kind_are_taken():
    from fastcache.tuning.pictures import pictures_in, psnr

    image = np.linspace(0, 255, 48).reshape(4, 4, 3).astype(np.uint8)
    for made in (image, [image], torch.from_numpy(image), (image.astype(np.float32),)):
        assert len(pictures_in(made)) == 1
    assert len(pictures_in(np.stack([image] * 3))) == 3
    pil = pytest.importorskip("PIL.Image").fromarray(image)
    worse = image.copy()
    worse[0, 0, 0] += 48
    expected = 10 * math.log10(255**2 / (48**2 / 48))
    assert psnr(pictures_in([pil]), pictures_in(worse)) == pytest.approx(expected)
    assert psnr(pictures_in(pil), pictures_in(image)) == math.inf
    assert psnr(pictures_in(torch.full((3, 3), math.nan)), pictures_in(torch.eye(3))) == -math.inf
    for nothing in (None, "picture", {"a": image}, [], torch.empty(0, 3), np.array(["a"])):
        with pytest.raises((TypeError, ValueError), match="generate"):
            pictures_in(nothing)
    with pytest.raises(ValueError, match="shapes"):
        psnr(pictures_in(image), pictures_in(image[1:]))
