# SPDX-License-Identifier: Apache-2.0
"""fastcache.tune on the shipped model."""

from __future__ import annotations

import pytest
import torch

import fastcache

pytest.importorskip("diffusers")


def test_it_tunes_the_shipped_model(tmp_path):
    from fastcache.demo import metrics
    from fastcache.demo.model import load_model
    from fastcache.demo.sample import generate

    model, labels = load_model(), torch.arange(2)

    def run(cache=None, num_inference_steps=28, seed=0):
        return generate(model, labels, steps=num_inference_steps, seed=seed, cache=cache)

    journal = tmp_path / "journal"
    found = fastcache.tune(run, model, speedup=2, progress=False, journal=journal)
    best = found.rows[0]
    plain = max(r.psnr for r in found.rows if r.recipe is None and r.speedup > 1.8)
    assert best.recipe is not None and best.speedup > 1.95 and best.psnr > plain + 6
    wanted = run(seed=7)
    with fastcache.enable(model, found.save(tmp_path / "tuned.json")) as cache:
        nearness = metrics.psnr(run(cache, best.steps, 7), wanted)
    assert nearness > metrics.psnr(run(num_inference_steps=14, seed=7), wanted) + 5
    again = fastcache.tune(run, model, speedup=2, progress=False, journal=journal)
    assert again.rows == found.rows
