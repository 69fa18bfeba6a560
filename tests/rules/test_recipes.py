# SPDX-License-Identifier: Apache-2.0
"""Recipes as files and by name: what is written comes back, and what is hostile does not come in."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import hostile
import pytest
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastcache
from fastcache import (
    DMD,
    Broadcast,
    Chebyshev,
    DualBlock,
    Extrapolate,
    FirstBlock,
    Fitted,
    Growing,
    Guidance,
    Guided,
    Hermite,
    InputChange,
    Interval,
    Magnitude,
    Mask,
    Misfit,
    Modules,
    Output,
    OutputSlope,
    Policy,
    Predictor,
    Recipe,
    Reuse,
    Rule,
    Sensitivity,
    Spread,
    Stack,
    Taylor,
    TaylorTable,
    TimestepRange,
    Widening,
    Zeros,
    cli,
    parts,
    preset,
    presets,
)
from fastcache.files import MAX_BYTES
from fastcache.policies import Calibrate
from fastcache.predictors import Constant
from fastcache.targets.spec import Nothing, TimestepWeight

# --- every recipe ----------------------------------------------------------------------------------------

counts, shares = st.integers(1, 60), st.floats(0, 1)
distances = counts | st.floats(1, 60)
positive = st.floats(0, 1e6) | st.just(math.inf)
reals = st.floats(-1e300, 1e300)
ranges = st.tuples(reals, reals).filter(lambda r: r[0] < r[1])
optional = lambda values: st.none() | values  # noqa: E731
words = st.text(max_size=20)
patterns = st.sampled_from([".*attn", r"^blocks\.\d+", "proj_out$", 'a"{', "été"])
several = st.lists(patterns, min_size=1, max_size=3).map(tuple)
guards = {
    "warmup": optional(st.integers(0, 9)),
    "max_skips": optional(st.integers(0, 9)),
    "last": optional(st.booleans()),
}
dtypes = optional(st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn]))
ratios = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9).map(tuple)
guides = st.sampled_from(["residual", "modulated", "input", "auto"])

POLICIES = {
    DualBlock: {
        "threshold": shares, "interval": counts, "max_reused": optional(counts),
        "budget": optional(shares), "compute": optional(st.lists(st.booleans(), min_size=1)),
        "refresh": optional(counts), "repeat": st.booleans(),
    },
    FirstBlock: {"threshold": positive, "per_sample": st.booleans()},
    Misfit: {"threshold": positive},
    Magnitude: {
        "threshold": positive, "max_skip_steps": counts, "retention_ratio": shares,
        "num_inference_steps": counts, "mag_ratios": ratios,
        "precision": st.sampled_from(["float32", "float64"]),
    },
    Calibrate: {},
    InputChange: {
        "threshold": positive, "coefficients": optional(st.lists(reals, min_size=1, max_size=5).map(tuple)),
        "at": st.just("model_input"), "power": optional(st.floats(0.1, 9)), "latents": st.none(),
        "num_inference_steps": optional(counts), "end_steps": st.integers(0, 9), "per_sample": st.booleans(),
    },
    OutputSlope: {
        "threshold": positive, "token_stride": counts, "start": st.floats(0, 0.4), "stop": st.floats(0.5, 1),
        "per_sample": st.booleans(),
    },
    Sensitivity: {
        "threshold": positive, "alpha_x": st.floats(0, 1e6), "alpha_t": st.floats(0, 1e6),
        "per_sample": st.booleans(),
    },
    Interval: {"n": distances, "phase": optional(counts), "stop": optional(counts)},
    Growing: {"n": counts, "first": counts},
    Spread: {"share": st.floats(0.01, 1), "first": counts, "growth": st.floats(0.25, 4)},
    TimestepRange: {"n": counts, "timesteps": ranges, "conditional_only": st.booleans()},
    Broadcast: {"timesteps": st.lists(reals, min_size=1, max_size=4).map(tuple), "steps": counts},
    Mask: {
        "compute": st.lists(st.booleans() | st.sampled_from([0, 1]), min_size=1, max_size=60),
        "scaled": st.booleans(),
    },
    Widening: {"window": st.floats(1, 9), "flex": st.floats(0, 9)},
}  # fmt: skip
fitted_rows = st.lists(
    st.tuples(st.integers(9, 30), st.just((8, 6)), st.tuples(reals, reals)), max_size=5
).map(tuple)
checks = st.shared(st.booleans(), key="checked")  # which takes order 2 or 3
PREDICTORS = {
    Reuse: {},
    Fitted: {"rows": fitted_rows, "keep": st.integers(2, 7)},
    Zeros: {},
    Taylor: {
        "order": st.integers(0, 4), "spacing": st.sampled_from(["latest", "exact"]),
        "skip_first": st.booleans(),
    },
    TaylorTable: {"order": st.integers(0, 4), "dtype": dtypes},
    Extrapolate: {
        "weight": reals | st.builds(Constant, reals), "feeds_back": st.booleans(),
        "ramp": optional(ranges),
    },
    Guided: {
        "order": checks.flatmap(lambda checked: st.integers(1 + checked, 3)), "guide": guides,
        "ridge": st.floats(0, 1), "tokens": counts,
        "max_misfit": optional(shares), "early": st.booleans(), "prior": st.integers(1, 2),
        "checked": checks,
    },
    Hermite: {"order": st.integers(0, 4), "scale": st.floats(0.01, 0.99)},
    Chebyshev: {"degree": st.integers(0, 6), "ridge": shares, "keep": st.integers(1, 7)},
    DMD: {"keep": st.integers(4, 8), "ridge": shares},
}  # fmt: skip
band = optional(reals | st.builds(TimestepWeight, reals, ranges))
TARGETS = {
    Stack: {"first": counts, "last": counts, "normed": st.booleans()},
    Output: {},
    Nothing: {},
    Modules: {
        "patterns": several, "match": st.sampled_from(["search", "full"]),
        "kind": st.sampled_from(["attention", "self", "spatial", "temporal", "cross", "any"]),
        "fallback": st.sampled_from([None, "attention", "blocks", "output"]),
        "exclude": st.lists(patterns, max_size=2).map(tuple), "label": words,
    },
    Guidance: {
        "inputs": optional(st.lists(st.text(min_size=1, max_size=9), min_size=1).map(tuple)),
        "tensor_format": st.sampled_from(["BCFHW", "BFCHW", "BCHW", "BSC"]),
        "grid": optional(st.lists(counts, min_size=2, max_size=3)), "low": band, "high": band,
        "compounding": st.booleans(), "label": words,
    },
}  # fmt: skip


def some(table: dict, more: dict) -> st.SearchStrategy:
    return st.sampled_from(list(table)).flatmap(lambda kind: st.builds(kind, **table[kind], **more))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """A recipe of one to three rules that go together, with guards set, filled in or left open."""
    found: Recipe | None = None
    for _ in range(draw(st.integers(1, 3))):
        when, what = draw(some(POLICIES, guards)), draw(some(PREDICTORS, {}))
        try:
            where = draw(some(TARGETS, {}))
            one = (
                Recipe(when, what, where)
                if draw(st.booleans())
                else Recipe.of([Rule(when, what, where)], draw(words))
            )
            found = one if found is None else found + one
        except ValueError:
            continue
    return found or Recipe(Interval(3))


def test_the_table_names_every_class_and_the_recipes_here_hold_them_all():
    for place, table in zip(parts.BASES, (POLICIES, PREDICTORS, TARGETS), strict=True):
        own = {k for k in parts.TABLE[place].values() if k.__module__.startswith("fastcache.")}
        assert own == set(table)
        for kind, drawn in table.items():
            assert {f.name for f in fields(kind)} == {*drawn, *(guards if place == "when" else ())}


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes())
def test_every_recipe_comes_back_equal(tmp_path_factory, recipe):
    text = json.dumps(recipe.to_dict(), allow_nan=False)
    again = Recipe.from_dict(json.loads(text))
    assert again == recipe and hash(again) == hash(recipe)
    assert again.digest("x") == recipe.digest("x") and repr(again) == repr(recipe)
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    assert Recipe.load(recipe.save(path)) == recipe


def combinations() -> list[Recipe]:
    """Every policy, predictor and target at least once, as they go together on a plain model."""
    found = []
    whens = [
        FirstBlock(0.15), Interval(3), Growing(3, 2), Spread(0.4), Mask(toys.STEPS * (1, 0)),
        TimestepRange(2, (100, 900)), Magnitude(0.1, mag_ratios=tuple(toys.RATIOS)),
        Broadcast((700, 300), 3), Misfit(0.5), Calibrate(),
        InputChange(0.5, (0.9, 0.01), "model_input"), OutputSlope(0.5, 2), Sensitivity(3.0, 0.5, 1e-3),
    ]  # fmt: skip
    whats = [
        Reuse(), Taylor(1), Taylor(2, "exact", True), Hermite(2), Chebyshev(), DMD(), Guided(1, tokens=2),
        Guided(2, "input"), Guided(3, "input", checked=True), TaylorTable(1, torch.bfloat16), Extrapolate(0.4),
        Extrapolate(Constant(0.3)), Zeros(),
    ]  # fmt: skip
    for when in whens:
        for what in whats:
            for where in (Stack(), Modules((r"\.attn$",), "search", "any")):
                try:
                    found.append(Recipe(replace(when, warmup=1, last=False), what, where))
                except ValueError:
                    continue
    return found


def runs(recipe: Recipe) -> tuple[list[torch.Tensor], str] | str:
    """What a run gives, or why there is none."""
    model, calls = toys.model(seed=1), toys.inputs(toys.STEPS)
    try:
        with fastcache.enable(model, recipe) as cache:
            found = []
            for i, call in enumerate(calls):
                with cache.context(
                    step_index=i,
                    num_inference_steps=toys.STEPS,
                    timestep=float(call["timestep"][0]),
                ):
                    found.append(toys.step(model, call))
            return found, toys.actions(cache)
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::fastcache.FastcacheWarning")
def test_a_loaded_recipe_gives_the_same_bits(tmp_path):
    ran = reused = 0
    for recipe in combinations():
        loaded = Recipe.load(recipe.save(tmp_path / "recipe.json"))
        wanted, found = runs(recipe), runs(loaded)
        if isinstance(wanted, str):
            assert found == wanted
            continue
        assert found[1] == wanted[1]
        assert all(map(torch.equal, found[0], wanted[0]))
        ran += 1
        reused += "." in wanted[1]
    assert ran > 120 and reused > 100


@pytest.mark.parametrize("method", toys.METHODS)
def test_a_config_s_recipe_comes_back_and_runs_alike(method, tmp_path):
    clock = toys.Clock()
    config = toys.config(method, clock)
    recipe = config.recipe()
    assert recipe == config.recipe()  # no function of its own in it
    loaded = Recipe.load(recipe.save(tmp_path / "recipe.json"))
    assert loaded == recipe and loaded.name == type(config).__name__
    outputs = []
    for one in (recipe, loaded):
        model = toys.build(method)
        with fastcache.enable(model, one) as cache:
            found = []
            for call in toys.inputs_for(method):
                with cache.context(timestep=float(call["timestep"].reshape(-1)[0])):
                    found.append(toys.step(model, call))
            outputs.append((found, toys.actions(cache)))
    assert outputs[0][1] == outputs[1][1] and "." in outputs[0][1]
    assert all(map(torch.equal, outputs[0][0], outputs[1][0]))


@pytest.mark.parametrize("name", presets())
def test_a_preset_s_recipe_comes_back(name):
    row, made = presets()[name], preset(name)
    assert isinstance(row["steps"], int) and row["steps"] > 1 and row["source"]
    recipe = made if isinstance(made, Recipe) else made.recipe()
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_file_says_what_it_is_and_may_hold_more(tmp_path):
    recipe = Recipe(FirstBlock(math.inf), Taylor(2)) + Recipe(Interval(3), None, Guidance())
    values = json.loads(recipe.save(tmp_path / "r.json").read_text())
    assert (values["format"], values["version"]) == ("fastcache-recipe", 1)
    assert values["rules"][1]["when"]["FirstBlock"]["threshold"] == {"float": "inf"}
    assert Recipe.from_dict({**values, "evidence": {"psnr": [1.0]}}) == recipe


def test_what_is_left_out_is_filled_in_as_in_a_recipe():
    def read(**row):
        return Recipe.from_dict({"format": "fastcache-recipe", "version": 1, "rules": [row]})

    assert read(when="Interval", what="Taylor") == Recipe(Interval(), Taylor())
    assert read(when={"Interval": {"n": 3, "warmup": 2}}) == Recipe(Interval(3, warmup=2))
    assert read(when="Interval", what="Taylor").when.warmup == 4
    left = read(when={"Interval": {"warmup": None}}, what="Taylor").when
    assert (left.warmup, left.last) == (None, True)
    assert read(when={"Growing": {"n": 3}}, what="Taylor").when.warmup == 0


# --- what no file can hold -------------------------------------------------------------------------------


def weight_of(module: object) -> float:
    return 0.5


@pytest.mark.parametrize(
    "recipe, said",
    [
        (lambda: Recipe(Interval(2), Extrapolate(weight_of), Modules()), r"rules\[0\].what.weight.*weight_of"),
        (lambda: Recipe(Interval(2), None, Guidance(low=lambda m, t: 1.0)), r"where.low.*<lambda>"),
        (
            lambda: fastcache.SeaCacheConfig(raw_vision_callback=weight_of).recipe(),
            r"rules\[0\].when.latents.*weight_of",
        ),
        (
            lambda: fastcache.FasterCacheConfig(
                attention_weight_callback=weight_of, current_timestep_callback=lambda: 0.0
            ).recipe(),
            "what.weight.*weight_of",
        ),
        (lambda: Recipe(Interval(2), Extrapolate(max), Modules()), "weight.*max"),
    ],
)  # fmt: skip
def test_callables_are_refused_by_name(recipe, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        recipe().save(tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


@dataclass(frozen=True)
class Odd(Policy):
    """A policy of a user's own, with a value of a class of its own."""

    offset: int = 1
    inner: object = None

    def _judge(self, run, step, signal, guard):
        reuse = not guard and step.index % 2 == self.offset
        return fastcache.Decision("reuse" if reuse else "compute")


@dataclass(frozen=True)
class Inner:
    numbers: tuple[float, ...] = (1.0, math.inf)


@pytest.fixture
def clean_table(monkeypatch):
    for place, known in parts.TABLE.items():
        monkeypatch.setitem(parts.TABLE, place, dict(known))


@pytest.mark.usefixtures("clean_table")
def test_a_class_of_ones_own_takes_one_call():
    recipe = Recipe(Odd(0, Inner()), Reuse())
    with pytest.raises(ValueError, match=r"Odd.*register_part\(Odd\)"):
        recipe.to_dict()
    assert fastcache.register_part(Odd) is Odd
    with pytest.raises(ValueError, match=r"when.inner.*Inner"):
        recipe.to_dict()
    fastcache.register_part(Inner)
    fastcache.register_part(Inner)  # again is nothing new
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe

    @fastcache.register_part
    @dataclass(frozen=True)
    class Half(Predictor):
        def weights(self, steps, step):
            return (0.5,)

    assert Recipe.from_dict(Recipe(Interval(2), Half()).to_dict()).what == Half()
    for wrong, kind, said in (
        (3, TypeError, "dataclass"),
        (type("Plain", (Policy,), {}), TypeError, "dataclass"),
        (dataclass(frozen=True)(type("Interval", (Policy,), {})), ValueError, "Interval"),
    ):
        with pytest.raises(kind, match=said):
            fastcache.register_part(wrong)


@pytest.mark.usefixtures("clean_table")
def test_a_field_that_a_file_would_change_is_refused():
    fastcache.register_part(Odd)
    with pytest.raises(ValueError, match="tuples"):
        Recipe(Odd(inner=[1, 2])).to_dict()
    with pytest.raises(ValueError, match="inner is a dict"):
        Recipe(Odd(inner={"a": 1})).to_dict()
    for value in (math.nan, 10**40, "x" * 2000):
        with pytest.raises(ValueError, match="recipe"):
            Recipe(Odd(inner=value)).to_dict()


# --- hostile files ---------------------------------------------------------------------------------------

SECRET = "s3cret"
MINIMAL = {"format": "fastcache-recipe", "version": 1, "rules": [{"when": "Interval"}]}


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as found:
        Recipe.load(path)
    message = str(found.value)
    assert message.startswith(f"recipe {path}: ")
    error: BaseException | None = found.value
    while error is not None:  # what a traceback would print
        assert SECRET not in str(error).replace(str(path), "")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return message


def rule(**row: object) -> dict:
    return {"rules": [{**MINIMAL["rules"][0], **row}]}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": SECRET}, "format"),
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"version": "1"}, "version"),
        ({"name": 7}, "name"),
        ({"name": SECRET * 1000}, "name"),
        ({"rules": []}, "rules"),
        ({"rules": SECRET}, "rules"),
        ({"rules": {"when": "Interval"}}, "rules"),
        ({"rules": [SECRET]}, r"rules[0]"),
        ({"rules": [{}]}, "rules[0]"),
        ({"rules": [{"what": "Reuse"}]}, "rules[0]"),
        (rule(**{SECRET: 1}), "rules[0]"),
        (rule(when=SECRET), "when must name one of"),
        (rule(when="Reuse"), "when must name one of"),
        (rule(when="Policy"), "when must name one of"),
        (rule(when="Constant"), "when must name one of"),
        (rule(when=None), "when"),
        (rule(when={}), "when"),
        (rule(when={"Interval": 3}), "when"),
        (rule(when={"Interval": {}, SECRET: {}}), "when"),
        (rule(when={"Interval": {SECRET: 1}}), "Interval has another field"),
        (rule(when={"Interval": {"n": SECRET}}), "n is not valid for Interval"),
        (rule(when={"Interval": {"n": [3]}}), "n is not valid for Interval"),
        (rule(when={"Interval": {"n": 0.5}}), "n is not valid for Interval"),
        (rule(when={"Interval": {"n": {"os.system": {}}}}), "rules[0].when.n"),
        (rule(when={"Interval": {"n": {"dtype": SECRET}}}), "rules[0].when.n"),
        (rule(when={"Interval": {"n": {"dtype": "__name__"}}}), "rules[0].when.n"),
        (rule(when={"Interval": {"n": {"float": "nan"}}}), "rules[0].when.n"),
        (rule(when={"FirstBlock": {"threshold": -1}}), "threshold is not valid"),
        (rule(when={"Mask": {"compute": [SECRET]}}), "compute is not valid"),
        (rule(when={"FirstBlock": {"threshold": {"Interval": {}}}}), "threshold is not valid"),
        (rule(what={"Extrapolate": {"weight": {"Constant": {"weight": 1}}}}), "go together"),
        (rule(what="Zeros"), "go together"),
        (rule(when="Misfit"), "go together"),
        (rule(where={"Modules": {"patterns": [SECRET + "("]}}), "patterns is not valid"),
        (rule(where={"Modules": {"label": SECRET * 1000}}), "where.label is too long"),
        ({"rules": [{"when": "Interval"}] * 2}, "second Stack"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named_and_never_repeated(tmp_path, change, said):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**MINIMAL, **change}))
    message = refused(path)
    assert said in message and len(message) < 500
    with pytest.raises(ValueError, match="recipe: "):
        Recipe.from_dict({**MINIMAL, **change})


WRONG = [
    SECRET,
    "",
    [],
    [SECRET],
    {},
    True,
    None,
    -1,
    0,
    7,
    1e300,
    {"float": "inf"},
    {"dtype": "int8"},
    [1, 0],
]


@pytest.mark.filterwarnings("ignore::fastcache.FastcacheWarning")
@pytest.mark.parametrize(
    "place, kind", [(p, k) for p in parts.BASES for k in parts.TABLE[p].values()], ids=str
)
def test_a_wrong_field_is_refused_when_it_is_read_or_enabled_and_never_in_mid_run(place, kind):
    others = {
        "when": Interval(2),
        "what": Reuse(),
        "where": Modules((r"\.attn$",), "search", "any"),
    }
    if kind in (FirstBlock, Misfit, Guided):
        others = {"when": Interval(2), "what": Guided(1), "where": Stack()}
    needed = {
        Magnitude: {"mag_ratios": [1.0]},
        Broadcast: {"timesteps": [500]},
        Mask: {"compute": [1]},
        Guidance: {"tensor_format": "BCHW"},
    }
    values = Recipe(**others).to_dict()
    for field in fields(kind):
        for value in WRONG:
            given = {**needed.get(kind, {}), field.name: value}
            row = {**values["rules"][0], place: {kind.__name__: given}}
            try:
                recipe = Recipe.from_dict({**values, "rules": [row]})
                cache = fastcache.enable(toys.build("faster_guided"), recipe)
            except (ValueError, TypeError) as error:
                assert SECRET not in str(error) or "recipe" not in str(error)
                continue
            with cache:
                for call in toys.inputs_for("faster_guided", 4):
                    with cache.context(num_inference_steps=4, timestep=float(call["timestep"][0])):
                        toys.step(cache.target, call)


@pytest.mark.parametrize("name", MINIMAL)
def test_missing_fields_are_named(tmp_path, name):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({k: v for k, v in MINIMAL.items() if k != name}))
    assert name in refused(path)


@pytest.mark.parametrize(
    "content, said",
    [
        *hostile.NO_OBJECT,
        (b'{"format": "fastcache-recipe", "version": NaN}', "NaN"),
        (b'{"format": "fastcache-recipe", "version": 1, "rules": [' + b"9" * 99, "digits"),
        (b"[" * 4_000_000, "nested"),
        (b'{"a":' * 800_000, "nested"),
        (b"[]," * 1_300_000, "lists"),
        (b'"' + b'\\"' * 2_000_000, "JSON"),
        (b'""' * 2_000_000, "lists"),
        (b'{"format": "fastcache-calibration", "version": 1, "rules": []}', "format"),
    ],
    ids=lambda v: repr(v[:24]) if isinstance(v, bytes) else None,
)
def test_what_is_no_recipe_is_refused_quickly(tmp_path, content, said):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    start = time.perf_counter()
    message = refused(path)
    assert time.perf_counter() - start < 2
    assert said in message and len(message) < 400


def test_100_megabytes_of_brackets_cost_neither_time_nor_memory(tmp_path):
    path = tmp_path / "r.json"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"[" * (1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    assert "larger than 4 MiB" in refused(path)
    assert time.perf_counter() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_what_would_be_too_large_to_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"recipe .*larger than"):
        Recipe(Mask((True,) * (MAX_BYTES // 9))).save(tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_python_values_that_are_no_json_are_refused():
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep}
    cyclic: dict = {**MINIMAL}
    cyclic["name"] = cyclic
    for values in (deep, cyclic, {**MINIMAL, "name": b"x"}, {**MINIMAL, "x": math.nan}, [1], None):
        with pytest.raises(ValueError, match="recipe: "):
            Recipe.from_dict(values)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    assert "regular file" in refused(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    assert "regular file" in refused(tmp_path / "folder.json")
    assert "cannot be read" in refused(tmp_path / ("a" * 5000 + ".json"))
    with pytest.raises(FileNotFoundError, match=r"recipe .*none\.json: no such file; recipe.save"):
        Recipe.load(tmp_path / "none.json")


# --- names -----------------------------------------------------------------------------------------------


def test_enable_and_update_take_names_and_paths(tmp_path):
    path = Recipe(Interval(2), Taylor(1)).save(tmp_path / "mine.json")
    model = toys.model()
    for what, recipe in (
        ("balanced", preset("balanced")),
        (path, Recipe.load(path)),
        (str(path), Recipe.load(path)),
        ("flux", preset("flux").recipe()),
    ):
        with fastcache.enable(model, what) as cache:
            assert cache.recipe == recipe
            assert cache.update("fast") is cache and cache.recipe == preset("fast")
            assert cache.update(path).recipe == Recipe.load(path)
            assert cache.update(str(path)).recipe == Recipe.load(path)
        assert fastcache.inspect(model, what, steps=10).text()
    with fastcache.enable(model, "flux") as cache:
        assert type(cache.config) is fastcache.FirstBlockCacheConfig


@pytest.mark.parametrize(
    "what, said",
    [
        ("balancd", "config.*balancd.*balanced"),
        ("", "config"),
        ("recipe.yaml", "config.*json"),
        (Path("recipe.yaml"), r"config.*\.json"),
        ("none.json", "recipe none.json: no such file"),
        (Path("none.json"), "recipe none.json: no such file"),
    ],
)
def test_names_of_nothing_leave_the_model_as_it_was(what, said):
    model = toys.model()
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=said):
        fastcache.enable(model, what)
    assert toys.snapshot(model) == before
    with fastcache.enable(model, "balanced") as cache:
        with pytest.raises(ValueError, match=said):
            cache.update(what)
        assert cache.recipe == preset("balanced") and cache.enabled


def test_commands_take_names_and_recipe_files(tmp_path, capsys):
    path = Recipe(Interval(2), Taylor(1, skip_first=True)).save(tmp_path / "mine.json")
    for named, recipe in (("balanced", preset("balanced")), (str(path), Recipe.load(path))):
        assert cli.main(["plan", named, "--steps", "12"]) == 0
        assert capsys.readouterr().out.strip() == str(recipe.plan(12))
        assert cli.main(["inspect", "demo", "--config", named]) == 0
        assert type(recipe.rules[0].when).__name__ in capsys.readouterr().out
    text = json.dumps(Recipe(Interval(4)).to_dict())
    assert cli.main(["plan", text, "--steps", "9"]) == 0
    (tmp_path / "bad.json").write_text(json.dumps({**MINIMAL, "rules": []}))
    capsys.readouterr()
    assert cli.main(["plan", str(tmp_path / "bad.json"), "--steps", "9"]) == 1
    assert "recipe" in (said := capsys.readouterr().err) and "rules" in said
    assert cli.main(["plan", "balancd", "--steps", "9"]) == 1
    assert "balanced" in capsys.readouterr().err


def test_all_values_that_parts_hold_are_dataclasses():
    assert all(is_dataclass(kind) for known in parts.TABLE.values() for kind in known.values())
