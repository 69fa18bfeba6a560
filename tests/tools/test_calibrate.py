# SPDX-License-Identifier: Apache-2.0
"""Calibration: what is measured, what it predicts, and what a file is refused for."""

from __future__ import annotations

import json
import math
import os
import resource
import time
import warnings

import hostile
import pytest
import torch
from torch import nn

import fastcache
from fastcache import Calibration, FirstBlockCacheConfig, MagCacheConfig
from fastcache.calibration.errors import CalibrationError
from fastcache.files import MAX_BYTES

STEPS = 10


class Block(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, width, generator=generator) / width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + torch.tanh(hidden_states @ self.weight)


class Model(nn.Module):
    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, i) for i in range(blocks))

    def forward(self, hidden_states: torch.Tensor, timestep: float = 0.0) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def inputs(steps: int = STEPS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 6, 8, generator=generator)
    return [math.cos(0.08 * i) * a + math.sin(0.08 * i) * b for i in range(steps)]


def generation(model: nn.Module, names: tuple[str, ...] = ("default",), steps: int = STEPS):
    """A run whose contexts see different inputs."""

    def run(cache):
        for i, x in enumerate(inputs(steps)):
            for n, name in enumerate(names):
                with cache.context(name, step_index=i, num_inference_steps=steps):
                    model((1 + n * i / steps) * x)

    return run


def residuals(model: Model, steps: int = STEPS, blocks: int | None = None) -> list[torch.Tensor]:
    found = []
    with torch.no_grad():
        for x in inputs(steps):
            y = x
            for block in list(model.blocks)[:blocks]:
                y = block(y)
            found.append(y - x)
    return found


@pytest.fixture
def model() -> Model:
    return Model().eval().requires_grad_(False)


@pytest.fixture
def calibration(model) -> Calibration:
    return fastcache.calibrate(generation(model), model, scheduler="Euler", source="test")


# --- measuring ------------------------------------------------------------------------------------


def test_ratios_are_the_mean_over_tokens_of_norm_ratios(model, calibration):
    r = residuals(model)
    expected = [1.0] + [
        (r[i].norm(dim=-1) / (r[i - 1].norm(dim=-1) + 1e-8)).mean().item() for i in range(1, STEPS)
    ]
    assert calibration.mag_ratios == pytest.approx(expected, rel=1e-6)
    assert calibration.mag_ratios[0] == 1.0
    assert calibration.steps == STEPS and calibration.runs == 1
    assert (calibration.model, calibration.scheduler, calibration.source) == (
        "Model",
        "Euler",
        "test",
    )


def test_first_block_changes_are_relative_l1_against_earlier_steps(model, calibration):
    r = residuals(model, blocks=1)
    rows = calibration.first_block["default"]
    assert [len(row) for row in rows] == list(range(STEPS))
    for i in range(STEPS):
        expected = [
            ((r[i] - r[j]).abs().sum() / r[j].abs().sum()).item() for j in range(i - 1, -1, -1)
        ]
        assert rows[i] == pytest.approx(expected, rel=1e-4)


def test_every_context_is_kept_and_the_mean_is_over_them(model):
    found = fastcache.calibrate(generation(model, ("cond", "uncond")), model)
    assert list(found.contexts) == list(found.first_block) == ["cond", "uncond"]
    assert found["cond"] != found["uncond"]
    mean = [(a + b) / 2 for a, b in zip(found["cond"], found["uncond"], strict=True)]
    assert found.mag_ratios == pytest.approx(mean)
    only = fastcache.calibrate(generation(model, ("cond", "uncond")), model, contexts=["uncond"])
    assert only.mag_ratios == pytest.approx(found["uncond"])


def test_a_stack_in_two_parts_gives_one_ratio_per_step():
    class Parts(Model):
        def __init__(self) -> None:
            super().__init__(2)
            self.layers = nn.ModuleList(Block(8, 5 + i) for i in range(2))

        def forward(self, hidden_states, timestep=0.0):
            hidden_states = 0.5 * super().forward(hidden_states)  # the lists do not join
            for block in self.layers:
                hidden_states = block(hidden_states)
            return hidden_states

    model = Parts().eval().requires_grad_(False)
    found = fastcache.calibrate([generation(model)] * 2, model)
    assert found.steps == len(found.mag_ratios) == STEPS and found.runs == 2
    with fastcache.enable(model, MagCacheConfig(calibrate=True)) as cache:
        generation(model)(cache)
        assert cache.calibration.mag_ratios == pytest.approx(found.mag_ratios)


def test_several_generations_are_averaged(model):
    single = fastcache.calibrate(generation(model), model)
    several = fastcache.calibrate([generation(model)] * 3, model)
    assert several.runs == 3
    assert several.mag_ratios == pytest.approx(single.mag_ratios)


def test_a_generation_without_arguments_is_called_without(model):
    def run(steps: int = STEPS) -> None:  # a default is no request for the cache
        for i, x in enumerate(inputs(steps)):
            model(x, timestep=1.0 - i / steps)

    assert fastcache.calibrate(run, model).steps == STEPS


def test_predicted_schedule_equals_the_real_one(model, calibration):
    """Inputs here do not depend on outputs, so the calibrated trajectory is the real one."""
    for threshold in (0.0, 0.1, 0.2, 0.3, 0.6):
        with (
            warnings.catch_warnings(),
            fastcache.enable(model, FirstBlockCacheConfig(threshold)) as cache,
        ):
            warnings.simplefilter("ignore")
            generation(model)(cache)
            computed = [r.step for r in cache.stats if r.action == "compute"]
        assert calibration.computed_steps(threshold) == computed


def test_threshold_for_a_share_is_the_smallest_that_reaches_it(calibration):
    for target in (1.0, 0.7, 0.5, 0.3):
        threshold = calibration.first_block_threshold(target)
        assert calibration.first_block_share(threshold) <= target
        if threshold:
            assert calibration.first_block_share(threshold * 0.99) > target
        assert calibration.mag_share(calibration.mag_threshold(target, max_skip_steps=9)) <= 1
    guarded = calibration.first_block_threshold(0.5, warmup=4, last=True)
    assert {0, 1, 2, 3, STEPS - 1} <= set(calibration.computed_steps(guarded, warmup=4, last=True))


@pytest.mark.parametrize("target", [0, -1, 1.5, math.nan, "half"])
def test_impossible_shares_are_refused(calibration, target):
    with pytest.raises((ValueError, TypeError), match="target_fraction"):
        calibration.first_block_threshold(target)


def test_unreachable_share_says_how_low_it_goes(calibration):
    with pytest.raises(CalibrationError, match=r"50%.*warmup"):
        calibration.first_block_threshold(0.3, warmup=5)
    with pytest.raises(CalibrationError, match="max_skip_steps"):
        calibration.mag_threshold(0.2, max_skip_steps=1)


def test_config_uses_ratios_and_steps(model, calibration):
    config = calibration.config(threshold=0.3, max_skip_steps=5)
    assert isinstance(config, MagCacheConfig)
    assert config.num_inference_steps == STEPS and config.threshold == 0.3
    assert config.mag_ratios.tolist() == pytest.approx(calibration.mag_ratios)
    plan = config.recipe().plan(STEPS)
    assert len(plan.computed) / STEPS == calibration.mag_share(0.3, max_skip_steps=5)


# --- what cannot be measured ----------------------------------------------------------------------


def test_run_that_never_calls_the_target_is_an_error(model):
    with pytest.raises(CalibrationError, match="nothing was measured"):
        fastcache.calibrate(lambda: None, model)
    fastcache.enable(model, FirstBlockCacheConfig(0.1)).disable()  # the model is free again


@pytest.mark.parametrize("run", [None, 3, [], [None]])
def test_run_must_be_callable(model, run):
    with pytest.raises(TypeError, match="run is"):
        fastcache.calibrate(run, model)


def test_wrong_number_of_steps_is_an_error(model):
    with pytest.raises(CalibrationError, match=r"num_inference_steps is 12.* 10 model calls"):
        fastcache.calibrate(generation(model), model, num_inference_steps=12)


def test_unknown_context_is_an_error(model):
    with pytest.raises(CalibrationError, match=r"'uncond'.*\['default'\]"):
        fastcache.calibrate(generation(model), model, contexts=["uncond"])


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_blocks_that_add_nothing_or_nan_are_an_error(model, value):
    for block in model.blocks:
        block.weight.fill_(value)
    with pytest.raises(CalibrationError, match="ratio of step"):
        fastcache.calibrate(generation(model), model)


def test_a_failing_run_surfaces_and_leaves_the_model_as_it_was(model):
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    hooks = [len(m._forward_hooks) for m in model.modules()]

    def run(cache):
        generation(model, steps=3)(cache)
        raise KeyError("from the user")

    with pytest.raises(KeyError, match="from the user"):
        fastcache.calibrate(run, model)
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == {
        name: set(d) for name, d in before.items()
    }


def test_results_of_a_calibrating_run_are_the_uncached_ones(model):
    uncached = [model(x) for x in inputs()]
    seen = []

    def run(cache):
        for i, x in enumerate(inputs()):
            with cache.context(step_index=i, num_inference_steps=STEPS):
                seen.append(model(x))

    fastcache.calibrate(run, model)
    assert all(map(torch.equal, uncached, seen))


# --- cache.calibration ----------------------------------------------------------------------------


def test_cache_calibration_is_an_object_keyed_by_context(model, capsys):
    """Upstream only prints the ratios, and under guidance two lists without a label."""
    with fastcache.enable(model, MagCacheConfig(calibrate=True)) as cache:
        generation(model, ("cond", "uncond"))(cache)
        during = cache.calibration
    assert cache.calibration.contexts == during.contexts  # also after disable
    assert list(during.contexts) == ["cond", "uncond"]
    assert during["cond"] == pytest.approx(
        fastcache.calibrate(generation(model, ("cond",)), model)["cond"]
    )
    assert capsys.readouterr().out == ""


def test_cache_calibration_survives_reset_and_update(model):
    with fastcache.enable(model, MagCacheConfig(calibrate=True)) as cache:
        generation(model)(cache)
        cache.reset()
        generation(model)(cache)
        assert cache.calibration.runs == 2
        cache.update(cache.calibration.config(threshold=0.3))
        generation(model)(cache)
        assert cache.stats.reused > 0


@pytest.mark.parametrize("compiler", [fastcache.compile, torch.compile], ids=lambda f: f.__module__)
def test_compiled_models_are_calibrated_eagerly(model, compiler):
    """Appending to a list inside a graph once made a new graph every step."""
    expected = fastcache.calibrate(generation(model), model)
    with fastcache.enable(model, MagCacheConfig(calibrate=True)) as cache:
        compiled = compiler(model, backend="eager", fullgraph=True)
        generation(compiled)(cache)
        generation(compiled)(cache)
        assert cache.calibration.mag_ratios == pytest.approx(expected.mag_ratios)
        assert cache.calibration.runs == 2


def test_cache_that_measured_nothing_says_so(model):
    with fastcache.enable(model, FirstBlockCacheConfig(0.1)) as cache:
        with pytest.raises(CalibrationError, match="calibrate=True"):
            _ = cache.calibration


# --- files ----------------------------------------------------------------------------------------


def test_file_round_trip(calibration, tmp_path):
    path = calibration.save(tmp_path / "c.json")
    assert Calibration.load(path) == calibration == Calibration.load(str(path))
    written = json.loads(path.read_text())
    wanted = {"format", "version", "mag_ratios", "model", "scheduler", "steps", "source"}
    assert wanted <= set(written)


def refused(path) -> str:
    with pytest.raises(ValueError) as caught:
        Calibration.load(path)
    message = str(caught.value)
    assert "calibration" in message
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    return message


SECRET = "s3cret"
MINIMAL = {"format": "fastcache-calibration", "version": 1, "mag_ratios": [1.0, 0.9]}


def test_minimal_file_loads(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(MINIMAL))
    assert Calibration.load(path).config().num_inference_steps == 2


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": SECRET}, "format"),
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"mag_ratios": []}, "mag_ratios"),
        ({"mag_ratios": SECRET}, "mag_ratios"),
        ({"mag_ratios": {SECRET: 1}}, "mag_ratios"),
        ({"mag_ratios": None}, "mag_ratios"),
        ({"mag_ratios": [1.0, 0]}, "mag_ratios"),
        ({"mag_ratios": [1.0, -0.5]}, "mag_ratios"),
        ({"mag_ratios": [1.0, True]}, "mag_ratios"),
        ({"mag_ratios": [1.0, SECRET]}, "mag_ratios"),
        ({"mag_ratios": [1.0, None]}, "mag_ratios"),
        ({"mag_ratios": [[1.0]]}, "mag_ratios"),
        ({"mag_ratios": [1.0] * 20_000}, "mag_ratios"),
        ({"contexts": [SECRET]}, "contexts"),
        ({"contexts": {"cond": [1.0, -1]}}, "contexts"),
        ({"first_block": {"cond": [[1.0]]}}, "first_block"),
        ({"first_block": {"cond": [[], [-1.0]]}}, "first_block"),
        ({"first_block": {"cond": SECRET}}, "first_block"),
        ({"model": 7}, "model"),
        ({"source": SECRET * 1000}, "source"),
        ({"steps": 2.5}, "steps"),
        ({"steps": 10**9}, "steps"),
        ({"runs": -1}, "runs"),
    ],
)
def test_wrong_fields_are_named_and_never_repeated(tmp_path, change, said):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**MINIMAL, **change}))
    message = refused(path)
    assert said in message and SECRET not in message


@pytest.mark.parametrize("name", ["format", "version", "mag_ratios"])
def test_missing_fields_are_named(tmp_path, name):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({k: v for k, v in MINIMAL.items() if k != name}))
    assert name in refused(path)


@pytest.mark.parametrize(
    "content, said",
    [
        *hostile.NO_OBJECT,
        (b'{"format": "fastcache-calibration", "version": 1, "mag_ratios": [1.0, NaN]}', "NaN"),
        (b'{"format": "fastcache-calibration", "version": 1, "mag_ratios": [Infinity]}', "Inf"),
        (b'{"format": "fastcache-calibration", "version": 1, "mag_ratios": [1e999]}', "mag_ratios"),
        (
            b'{"format": "fastcache-calibration", "version": 1, "mag_ratios": [' + b"9" * 99,
            "digits",
        ),
        (b"[" * 4_000_000, "nested"),
        (b'{"a":' * 800_000, "nested"),
        (b"[]," * 1_300_000, "lists"),
        (b'"' + b'\\"' * 2_000_000, "JSON"),
        (b'""' * 2_000_000, "lists"),
    ],
    ids=lambda v: repr(v[:24]) if isinstance(v, bytes) else None,
)
def test_what_is_no_calibration_is_refused_quickly(tmp_path, content, said):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    start = time.perf_counter()
    message = refused(path)
    assert time.perf_counter() - start < 2
    assert said in message and SECRET not in message and len(message) < 400


def test_brackets_inside_strings_are_not_nesting(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**MINIMAL, "source": '[[[[[[[[[[[[{{{{ "\\" \\'}))
    assert Calibration.load(path).source.endswith("\\")


def test_100_megabytes_of_brackets_cost_neither_time_nor_memory(tmp_path):
    path = tmp_path / "c.json"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"[" * (1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    assert "larger than 4 MiB" in refused(path)
    assert time.perf_counter() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    assert MAX_BYTES == 4 << 20


def test_missing_file_is_also_a_file_not_found_error(tmp_path):
    for kind in (ValueError, FileNotFoundError, CalibrationError):
        with pytest.raises(kind, match=r"calibration .*none\.json: no such file"):
            Calibration.load(tmp_path / "none.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert "regular file" in refused(tmp_path / "pipe")
    assert "regular file" in refused(tmp_path)


def test_objects_are_checked_like_files():
    for ratios in ([], [math.nan], [math.inf], [-1.0]):
        with pytest.raises(CalibrationError, match="mag_ratios"):
            Calibration(ratios)
    with pytest.raises(CalibrationError, match="first_block is empty"):
        Calibration([1.0, 0.9]).first_block_threshold(0.5)


# --- TeaCache's polynomial --------------------------------------------------------------------------


def modulated_calls() -> list[dict]:
    import toys

    return toys.inputs(20, speed=0.06)


def modulated_calibration(jobs: int = 1) -> Calibration:
    import toys
    from modulated import ADAPTER, ModulatedModel

    model = ModulatedModel()

    def run(cache):
        for i, call in enumerate(modulated_calls()):
            with cache.context("cond", step_index=i, num_inference_steps=20):
                toys.step(model, call)

    return fastcache.calibrate([run] * jobs, model, adapter=ADAPTER)


def test_input_and_output_changes_are_relative_l1_of_one_step_to_the_next():
    import toys
    from modulated import ModulatedModel

    model, inputs, outputs = ModulatedModel(), [], []
    model.blocks[0].norm.register_forward_hook(lambda _, args, out: inputs.append(out.double()))
    outputs = [out.double() for out in toys.plain(model, modulated_calls())]
    expected = [
        tuple(
            float((v[i] - v[i - 1]).abs().sum() / v[i - 1].abs().sum()) for v in (inputs, outputs)
        )
        for i in range(1, 20)
    ]
    found = modulated_calibration().input_changes["cond"]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-4)
    assert [y for _, y in found] == pytest.approx([y for _, y in expected], rel=1e-4)
    assert len(modulated_calibration(jobs=2).input_changes["cond"]) == 2 * 19


def test_the_polynomial_is_found_where_there_is_one():
    import numpy as np

    truth = (30.0, -2.0, 0.5, 0.9, 0.01)
    x = np.linspace(0.01, 0.5, 40)
    pairs = tuple(zip(x.tolist(), np.polyval(truth, x).tolist(), strict=True))
    calibration = Calibration((1.0,), input_changes={"cond": pairs})
    fit = calibration.input_fit()
    assert fit.coefficients == pytest.approx(truth, rel=1e-6) and fit.r2 == pytest.approx(1)
    config = calibration.tea_cache(threshold=0.3)
    assert type(config) is fastcache.TeaCacheConfig and config.threshold == 0.3
    assert config.coefficients == fit.coefficients and config.num_inference_steps == 1


def test_r2_is_that_of_least_squares_and_a_poor_fit_warns():
    import numpy as np

    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 1, 60), rng.uniform(0, 1, 60)
    pairs = tuple(zip(x.tolist(), y.tolist(), strict=True))
    calibration = Calibration((1.0,), input_changes={"cond": pairs})
    line = np.polyfit(x, y, 4)
    r2 = 1 - ((np.polyval(line, x) - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert calibration.input_fit().r2 == pytest.approx(r2) and r2 < 0.5
    with pytest.warns(fastcache.FastcacheWarning, match="R² 0"):
        calibration.tea_cache()


@pytest.mark.parametrize(
    "pairs", [((0.1, 0.2),), ((0.1, 0.2), (0.1, 0.4)), ((0.1, 0.2), (0.3, 0.2))]
)
def test_few_changes_give_a_line_or_a_number(pairs):
    fit = Calibration((1.0,), input_changes={"a": pairs}).input_fit()
    assert len(fit.coefficients) == 5 and fit.coefficients[:3] == (0.0, 0.0, 0.0)
    assert math.isfinite(fit.r2)


def test_the_polynomial_comes_back_from_a_file_and_goes_into_a_run(tmp_path):
    from modulated import ADAPTER, ModulatedModel

    calibration = modulated_calibration()
    loaded = Calibration.load(calibration.save(tmp_path / "c.json"))
    assert loaded.input_changes == calibration.input_changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = loaded.tea_cache(threshold=0.2)
    with fastcache.enable(ModulatedModel(), config, adapter=ADAPTER) as cache:
        assert cache.recipe.when.coefficients == loaded.input_fit().coefficients


def test_without_a_known_modulation_there_is_none_and_it_says_what_to_do(calibration):
    assert calibration.input_changes == {}
    with pytest.raises(CalibrationError, match=r"input_changes is empty.*modulation"):
        calibration.tea_cache()
    with pytest.raises(CalibrationError, match="context must be one of"):
        modulated_calibration().input_fit("uncond")


@pytest.mark.parametrize(
    "rows", [5, [], [[1.0]], [[1.0, -1.0]], [[1.0, math.nan]], [["a", 1.0]], [[True, 1.0]], "ab"]
)
def test_wrong_input_changes_are_refused(rows):
    with pytest.raises(CalibrationError, match="input_changes"):
        Calibration((1.0,), input_changes={"a": rows})
