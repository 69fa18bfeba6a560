# SPDX-License-Identifier: Apache-2.0
"""What is said and drawn about runs: verdicts, the progress line, pictures."""

from __future__ import annotations

import builtins
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fastcache
from fastcache import (
    FirstBlock,
    FirstBlockCacheConfig,
    Interval,
    MagCacheConfig,
    Magnitude,
    Mask,
    Policy,
    PyramidAttentionBroadcastConfig,
    Recipe,
    Taylor,
    TaylorSeerCacheConfig,
    TimestepRange,
)
from fastcache.ops import dispatch
from fastcache.reporting.summary import summarise
from fastcache.runtime.stats import Record, Stats
from fastcache.runtime.verdict import verdict

STEPS = 10
SILENT = ("", "")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden_states, timestep=None):
        for block in self.blocks:
            hidden_states = hidden_states + 0.1 * block(hidden_states)
        return hidden_states


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def run(model, cache, steps: int = STEPS, names=("default",), request: int = 0) -> None:
    a, b = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    for i in range(steps):
        for name in names:
            with cache.context(name, request=request, step_index=i, num_inference_steps=steps):
                model(math.cos(0.05 * i) * a + math.sin(0.05 * i) * b)


def said(model, config, after=lambda cache: None, steps: int = STEPS) -> list[str]:
    """Warnings of one run under `config`, up to and including disable."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fastcache.enable(model, config) as cache:
            run(model, cache, steps)
            after(cache)
    return [str(w.message) for w in caught]


def records(actions: str, signals=None, reasons=None, timesteps=None) -> list[Record]:
    """Records of a run: C computes, a dot reuses."""
    rows = []
    for i, a in enumerate(actions):
        rows.append(
            Record(
                0,
                "cond",
                i,
                "compute" if a == "C" else "reuse",
                signals[i] if signals else None,
                0.1,
                reasons[i] if reasons else ("first step" if i == 0 else "rule"),
                timesteps[i] if timesteps else None,
                (),
                "Model",
            )
        )
    return rows


# --- verdicts -------------------------------------------------------------------------------------


def test_run_without_a_hit_names_the_smallest_change_and_what_to_do():
    rows = records("CCCCCC", signals=[None, 0.5, 0.3, 0.2, 0.4, math.nan])
    kind, message = verdict(rows, Recipe(FirstBlock(0.1)))
    assert kind == "nothing"
    assert "no step of 6" in message and "0.2, is above the threshold 0.1" in message
    assert "fewer steps" in message


@dataclass(frozen=True)
class OwnRule(Policy):
    """A policy of a user's own, which weighs an error."""

    threshold: float = 0.1
    weighs = "error"


def test_a_rule_of_a_users_own_is_judged_by_what_it_weighs():
    rows = records("CCCCCC", signals=[None, *[0.5] * 4, 0.2])
    assert "the smallest error seen, 0.2" in verdict(rows, Recipe(OwnRule()))[1]
    rows = records("C.......", signals=[None, *[0.2] * 7])
    assert verdict(rows, Recipe(OwnRule(5.0)))[0] == "everything"


def test_run_reused_throughout_names_the_largest_change():
    rows = records("C.......", signals=[None, *[0.2] * 7])
    kind, message = verdict(rows, Recipe(FirstBlock(5.0)))
    assert kind == "everything"
    assert "threshold 5" in message and "largest 0.2" in message and "lower" in message


@pytest.mark.parametrize(
    "recipe, rows, said",
    [
        (Recipe(FirstBlock(0.1)), records("CCCCC", signals=[None, *[math.nan] * 4]), "finite"),
        (
            Recipe(FirstBlock(0.1, warmup=9)),
            records("CCCCC", reasons=["first step", *["warm-up"] * 4]),
            "warm-up",
        ),
        (
            Recipe(TimestepRange(2)),
            records("CCCCC", timesteps=[1.0, 0.8, 0.6, 0.4, 0.2]),
            "never inside the range 100 to 800",
        ),
        (Recipe(TimestepRange(2)), records("CCCCC"), "no timestep was known"),
        (Recipe(Interval(9)), records("CCCCC", reasons=["nothing valid to reuse"] * 5), "twice"),
        (Recipe(Interval(9)), records("CCCCC", reasons=["interval"] * 5), "interval"),
    ],
)
def test_the_reason_is_given(recipe, rows, said):
    kind, message = verdict(rows, recipe)
    assert kind == "nothing" and said in message


@pytest.mark.parametrize(
    "recipe, rows",
    [
        (Recipe(FirstBlock(0.1)), records("C.C.C.C.")),  # as it should be
        (Recipe(FirstBlock(0.1)), records("CCC")),  # too short to judge
        (Recipe(FirstBlock(0.0)), records("CCCCCCCC")),  # asked for
        (Recipe(Interval(1)), records("CCCCCCCC")),
        (Recipe(Mask((True, True))), records("CCCCCCCC")),
        (Recipe(Magnitude(0.1, 0, mag_ratios=(1.0,))), records("CCCCCCCC")),
        (Recipe(Mask((True, *[False] * 7))), records("C.......")),  # a schedule, chosen as it is
        (Recipe(Interval(8)), records("C.......")),
        (MagCacheConfig(calibrate=True).recipe(), records("CCCCCCCC")),
    ],
)
def test_what_was_asked_for_is_not_warned_about(recipe, rows):
    assert verdict(rows, recipe) == SILENT


def test_warning_comes_when_a_run_ends_and_once(model):
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fastcache.enable(model, FirstBlockCacheConfig(1e-6)) as cache:
            run(model, cache)
            seen.append(len(caught))  # the run might go on
            run(model, cache)  # the step index goes back
            seen.append(len(caught))
            cache.reset()
            seen.append(len(caught))
        seen.append(len(caught))
    assert seen == [0, 1, 1, 1]


def test_warning_also_comes_with_disable(model):
    messages = said(model, FirstBlockCacheConfig(1e-6))
    assert len(messages) == 1 and "no step of 10 was reused" in messages[0]
    assert said(model, FirstBlockCacheConfig(50.0))[0].count("each of the 9 steps") == 1


def test_warnings_as_errors_do_not_keep_the_model(model):
    """The verdict once came before the removal, which it then prevented."""
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no step of 10"):
            with fastcache.enable(model, FirstBlockCacheConfig(1e-6)) as cache:
                run(model, cache)
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before


def test_good_runs_and_interrupted_ones_are_quiet(model):
    assert said(model, FirstBlockCacheConfig(0.15)) == []
    assert said(model, FirstBlockCacheConfig(0.0)) == []

    def fail(cache):
        with pytest.raises(KeyError), cache.context():
            raise KeyError

    assert said(model, FirstBlockCacheConfig(1e-6), after=fail) == []


def test_the_summary_is_a_function_of_data(model):
    with fastcache.enable(model, FirstBlockCacheConfig(0.2)) as cache:
        run(model, cache)
        kernels = dispatch.active("cpu")
        told = (cache.recipe, cache.stats, cache.hooked(), cache.nbytes(), kernels)
        assert summarise(*told) == cache.summary()
        assert "hooked in Model: blocks" in summarise(*told) and kernels in summarise(*told)
    assert "on nothing (disabled)" in summarise(cache.recipe, cache.stats, {}, 0, kernels)


def test_many_hooked_names_are_cut_short():
    names = [f"blocks.{i}" for i in range(9)]
    text = summarise(Recipe(Mask((1, 0))), Stats(), {"Model": names}, 0, "cpp")
    assert "hooked in Model: blocks.0, blocks.1, blocks.2, blocks.3 and 5 more" in text


def test_last_run_of_stats_is_the_last_one(model):
    stats = Stats()
    for model_name, request, context, steps in (
        ("M", 0, "cond", range(4)),
        ("M", 0, "uncond", range(4)),
        ("M", 0, "cond", range(3)),
        ("N", 0, "cond", range(9)),
        ("M", 1, "cond", range(8)),
    ):
        for i in steps:
            stats.add(Record(request, context, i, "compute", None, None, "", None, (), model_name))
    assert [r.step for r in stats.last_run("M", 0, "cond")] == [0, 1, 2]
    assert [r.step for r in stats.last_run("M", 0, "uncond")] == [0, 1, 2, 3]
    assert stats.last_run("M", 7, "cond") == []


# --- the progress line ----------------------------------------------------------------------------


def test_progress_counts_calls_and_hits(model, capsys):
    with fastcache.enable(model, Recipe(Mask((1, 0) * 5))) as cache:
        with cache.progress(STEPS) as bar:
            run(model, cache)
            assert bar.n == STEPS and bar.postfix == "reused 5/10"
        run(model, cache)
        assert bar.n == STEPS  # it listens no longer
        with fastcache.progress(cache, STEPS, desc="mine"):
            run(model, cache)
    shown = capsys.readouterr().err
    assert "reused 5/10" in shown and "mine" in shown


def test_progress_stops_listening_after_an_error(model):
    with fastcache.enable(model, Recipe(Mask((1, 0)))) as cache:
        with pytest.raises(KeyError), cache.progress(disable=True):
            raise KeyError
        assert cache.stats.watch is None


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(0.15),
        Recipe(FirstBlock(0.15), Taylor(order=1)),
        MagCacheConfig(threshold=0.2, mag_ratios=[1.0, 0.98], num_inference_steps=STEPS),
        Recipe(Interval(3)),
    ],
    ids=lambda c: type(getattr(c, "when", c)).__name__,
)
def test_picture_of_a_run(model, config, tmp_path):
    with fastcache.enable(model, config) as cache:
        run(model, cache, names=("cond", "uncond"))
        written = cache.plot(tmp_path / "run.png")
    assert written == tmp_path / "run.png"
    assert written.read_bytes().startswith(b"\x89PNG") and written.stat().st_size > 10_000


def test_picture_after_disable_and_of_many_requests(model, tmp_path):
    with fastcache.enable(model, FirstBlockCacheConfig(0.15)) as cache:
        for request in range(20):
            run(model, cache, request=request)
    assert cache.plot(tmp_path / "run.png").stat().st_size > 10_000


def test_picture_of_several_rules(tmp_path):
    tiny = pytest.importorskip("tiny")
    pytest.importorskip("diffusers")
    net, inputs = tiny.build("Wan3D")
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        current_timestep_callback=lambda: 500,
    )
    with fastcache.enable(net, config) as cache:
        for call in tiny.trajectory("Wan3D", inputs, 6):
            tiny.output(net, call)
        assert cache.plot(tmp_path / "run.png").stat().st_size > 5_000


def test_nothing_to_draw_is_an_error(model, tmp_path):
    with fastcache.enable(model, FirstBlockCacheConfig(0.1)) as cache:
        with pytest.raises(ValueError, match="no denoiser call"):
            cache.plot(tmp_path / "run.png")


@pytest.mark.parametrize("first_block", [True, False])
def test_picture_of_a_calibration(model, first_block, tmp_path):
    found = fastcache.calibrate(
        lambda cache: run(model, cache, names=("cond", "uncond")), model, scheduler="Euler"
    )
    if not first_block:
        found = fastcache.Calibration(found.mag_ratios)
    assert found.plot(tmp_path / "c.png").stat().st_size > 10_000


@pytest.mark.parametrize("module", ["matplotlib", "tqdm"])
def test_missing_libraries_are_named_with_the_extra(model, monkeypatch, tmp_path, module):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with fastcache.enable(model, Recipe(Mask((1, 0)))) as cache:
        run(model, cache)
        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(ImportError, match=rf"{module}.*fastcache-dit\[bench\]"):
            if module == "tqdm":
                cache.progress().__enter__()
            else:
                cache.plot(tmp_path / "run.png")


def test_drawing_leaves_pyplot_alone(model, tmp_path):
    """A notebook's backend and open figures are the user's."""
    import matplotlib

    before = matplotlib.get_backend()
    with fastcache.enable(model, TaylorSeerCacheConfig(cache_identifiers=["blocks.1"])) as cache:
        run(model, cache)
        cache.plot(tmp_path / "run.png")
    assert matplotlib.get_backend() == before
