# SPDX-License-Identifier: Apache-2.0
"""Bad arguments, errors, interrupts and limits of fastcache.tune."""

from __future__ import annotations

import math

import pytest
import torch
from hostile import NO_OBJECT
from torch import nn
from tuning_world import Flow, clock, fingerprint, generation, tuned

import fastcache

__all__ = ["clock"]
pytestmark = pytest.mark.usefixtures("clock")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one"), ({"speedup": 2, "error": 40}, "exactly one"), ({"speedup": 0.5}, "speedup"),
        ({"speedup": math.inf}, "speedup"), ({"speedup": math.nan}, "speedup"), ({"speedup": "2"}, "speedup"),
        ({"error": math.nan}, "error"), ({"speedup": 2, "steps": 0}, "steps"), ({"speedup": 2, "steps": ()}, "steps"),
        ({"speedup": 2, "steps": "some"}, "steps"), ({"speedup": 2, "steps": 2.5}, "steps"),
        ({"speedup": 2, "reference": "best"}, "reference"), ({"speedup": 2, "seeds": ()}, "seeds"),
        ({"speedup": 2, "seeds": "01"}, "seeds"), ({"speedup": 2, "seeds": (0.5,)}, "seeds"),
        ({"speedup": 2, "minutes": -1}, "minutes"), ({"speedup": 2, "minutes": math.nan}, "minutes"),
        ({"speedup": 2, "progress": "no"}, "progress"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_run(options, said):
    model = Flow()

    def generate(cache, num_inference_steps, seed):
        raise AssertionError("it was run")

    with pytest.raises((TypeError, ValueError), match=said):
        tuned(model, generate, **options)


def test_a_generation_that_cannot_be_called_is_refused():
    model = Flow()
    for generate, said in (
        (3, "generate"), (lambda prompt: None, "prompt"), (lambda seed, /: None, "seed"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=said):
            tuned(model, generate, speedup=2)
    with pytest.raises(TypeError, match="target"):
        fastcache.tune(generation(model), "model", speedup=2)


def test_a_target_that_is_enabled_is_refused_and_stays_so():
    model = Flow()
    with fastcache.enable(model, "balanced") as cache:
        with pytest.raises(ValueError, match="enabled"):
            tuned(model, speedup=2)
        assert cache.enabled


def test_other_steps_than_were_said_and_a_loop_that_cannot_be_told():
    model = Flow()
    whole = generation(model)

    def fixed(cache, seed=0):
        return whole(cache, 12, seed)

    with pytest.raises(ValueError, match="takes 12"):
        tuned(model, fixed, speedup=2)
    with pytest.raises(ValueError, match="num_inference_steps"):
        tuned(model, fixed, speedup=2, steps=(12, 16))
    with pytest.raises(ValueError, match="converged"):
        tuned(model, fixed, speedup=2, steps=12, reference="converged")
    found = tuned(model, fixed, speedup=2, steps=12)
    assert found.best is not None and {r.steps for r in found.rows} == {12}


def test_a_generation_that_does_not_repeat_or_does_not_use_the_target_is_refused():
    model, other = Flow(), Flow()
    with pytest.raises(ValueError, match="seed"):
        tuned(model, lambda cache, num_inference_steps: torch.randn(4, 4), speedup=2)
    with pytest.raises(ValueError, match="no call of target"):
        tuned(model, generation(other), speedup=2)


def test_a_generation_without_a_seed_is_judged_once():
    model = Flow()
    whole = generation(model)
    found = tuned(
        model, lambda cache, num_inference_steps: whole(cache, num_inference_steps), speedup=2
    )
    assert {r.seeds for r in found.rows} <= {(0,)} | {
        r.seeds for r in found.rows if r.recipe is None
    }
    assert found.best is not None


def test_a_model_that_no_recipe_fits_says_why():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Linear(6, 6)

        def forward(self, x, t):
            return self.weight(x)

    model = Plain()
    with pytest.raises(ValueError, match="nothing to hook in Plain"):
        tuned(model, generation(model), speedup=2)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 40, 400, 2000])
def test_whatever_ends_it_leaves_the_model_as_it_was(kind, after):
    model = Flow()
    before, calls = fingerprint(model), []

    def breaks(module, args):
        calls.append(None)
        if len(calls) > after:
            raise kind

    handle = model.transformer_blocks[0].register_forward_pre_hook(breaks)
    hooked = fingerprint(model)
    try:
        tuned(model, speedup=2)
    except (Stop, KeyboardInterrupt, ValueError):
        pass
    assert fingerprint(model) == hooked
    handle.remove()
    assert fingerprint(model) == before
    fastcache.enable(model, "balanced").disable()


# --- limits and journals -----------------------------------------------------------------------------------


def test_no_time_at_all_gives_an_answer_that_says_so():
    found = tuned(Flow(), speedup=2, minutes=0)
    assert found.best is None and found.rows == () and not found.evidence["complete"]
    assert "more minutes" in str(found)


def test_a_limit_is_kept(monkeypatch):
    from tuning_world import Ticks

    monkeypatch.setattr("time.monotonic", lambda: Ticks.now)
    model = Flow()
    whole, limit = tuned(model, speedup=2), 20 * 16 * 4
    start = Ticks.now
    found = tuned(model, speedup=2, minutes=limit / 60)
    spent = Ticks.now - start
    assert 0.8 * limit < spent <= limit and not found.evidence["complete"]
    assert "time limit" in found.verdict and 10 < len(found.rows) < len(whole.rows)
    assert found.best is not None and found.rows[0].speedup >= 1.98


class Limited:
    """Lets so many blocks run."""

    def __init__(self, model, blocks):
        self.left = blocks
        self.handle = model.transformer_blocks[0].register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.left -= 1
        if not self.left:
            self.handle.remove()
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "options", [{"speedup": 2, "steps": (16, 20)}, {"error": 45}], ids=["speedup", "error"]
)
def test_resumed_it_gives_the_same_answer(tmp_path, options):
    model = Flow()
    calls = Limited(model, 10**9)
    whole = tuned(model, **options)
    calls.handle.remove()
    path, blocks = tmp_path / "journal", (10**9 - calls.left) // 8
    for _ in range(5):
        Limited(model, blocks)
        with pytest.raises(KeyboardInterrupt):
            tuned(model, journal=path, **options)
        with path.open("a") as file:
            file.write('{"key": "torn')
    again = tuned(model, journal=path, **options)
    assert again.rows == whole.rows and again.best == whole.best
    assert again.verdict == whole.verdict
    calls = Limited(model, 10**9)
    assert tuned(model, journal=path, **options).rows == whole.rows
    assert 10**9 - calls.left < 40  # nothing was run again
    calls.handle.remove()


def test_a_journal_of_another_tuning_is_refused(tmp_path):
    path = tmp_path / "journal"
    model = Flow()
    tuned(model, speedup=3, minutes=0, journal=path)
    for options, said in (({"speedup": 2}, "goal"), ({"speedup": 3, "seeds": (4,)}, "seeds")):
        with pytest.raises(ValueError, match=said):
            tuned(model, journal=path, **options)
    for data, _ in NO_OBJECT:
        if b"\n" in data + b"\n" and data:
            path.write_bytes(data + b"\n")
            with pytest.raises(ValueError, match="journal") as caught:
                tuned(model, speedup=3, journal=path)
            assert "s3cret" not in str(caught.value)
    with pytest.raises(ValueError, match="journal"):
        tuned(model, speedup=3, journal=tmp_path)
