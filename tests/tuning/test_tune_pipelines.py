# SPDX-License-Identifier: Apache-2.0
"""fastcache.tune on diffusers' own pipelines, of tiny random parts: guidance, a second-order solver, PIL images."""

from __future__ import annotations

import pytest
import torch
from tuning_world import fingerprint

import fastcache
from fastcache import Tuning

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("name", "kind"), [("lumina2", "pil"), ("sd3_heun", "np")])
def test_a_pipeline_is_tuned_and_left_as_it_was(name, kind, tmp_path):
    import tiny_pipelines

    pipe, inputs = getattr(tiny_pipelines, name)()
    pipe.set_progress_bar_config(disable=True)

    def generate(num_inference_steps=6, seed=0):
        own = {"generator": torch.Generator().manual_seed(seed), "output_type": kind}
        return pipe(**inputs | own | {"num_inference_steps": num_inference_steps})

    generate()
    before = fingerprint(pipe.transformer), sorted(vars(pipe))
    found = fastcache.tune(generate, pipe, speedup=1.3, steps=6, minutes=0.3, progress=False)
    assert (fingerprint(pipe.transformer), sorted(vars(pipe))) == before
    assert found.evidence["scheduler"] == type(pipe.scheduler).__name__
    cached = [r for r in found.rows if r.recipe is not None]
    # a share of the model's calls: of Heun's 11 calls for 6 steps a threshold may compute the first alone
    assert len(cached) > 2 and all(0.5 < r.computed <= 6 for r in cached)
    with fastcache.enable(pipe, found.save(tmp_path / "tuned.json")) as cache:
        generate(found.num_inference_steps)
        assert (cache.stats.reused > 0) == (found.best is not None)
    assert Tuning.load(tmp_path / "tuned.json").verdict == found.verdict
