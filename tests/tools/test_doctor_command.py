# SPDX-License-Identifier: Apache-2.0
"""`fastcache doctor` as a command: how targets and configs are named, its status, its JSON."""

from __future__ import annotations

import functools
import json

import patients
import pytest
from torch import nn

import fastcache
from fastcache import cli
from fastcache.cli.doctor import target_from
from fastcache.cli.parse import config_from, written
from fastcache.tools.doctor import steps_of


def command(capsys, *args: str) -> tuple[int, str]:
    status = cli.main(["doctor", *args])
    streams = capsys.readouterr()
    return status, streams.out + streams.err


@pytest.mark.parametrize("name", ["model", "pipe", "made", "Plain", "with_a_run"])
def test_objects_functions_and_classes(name, capsys):
    status, text = command(capsys, f"patients:{name}")
    assert status == 0 and text.startswith("works") and "what to write:\n    cache = " in text
    assert ("tried" in text) == (name == "with_a_run")


def test_the_status_tells_that_it_will_not_work(capsys):
    for name in ("number", "past_it", "raising"):
        status, text = command(capsys, f"patients:{name}")
        assert status == 1 and text.startswith("works      no\n")


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["no.such.module:x"], "cannot import"),
        (["patients:asking"], "cannot be called without arguments"),
        (["patients:nothing"], "has no 'nothing'"),
        (["patients:broken_pair"], "must return (target, run)"),
        (["patients:model", "--config", "nope"], "config: 'nope'"),
        (["patients:model", "--steps", "0"], "steps is 0"),
    ],
)
def test_bad_input_is_one_line(args, what, capsys):
    status, text = command(capsys, *args)
    assert status == 1 and what in text and text.count("\n") == 1


FIRST = '{"config": "firstblock", "threshold": 0.5}'


def test_json(capsys):
    status, text = command(capsys, "patients:with_a_run", "--json", "--config", FIRST)
    found = json.loads(text)
    assert status == 0 and found["works"] and found["computed"] is None
    assert found["denoisers"][0]["hooked"] == ["blocks (3 blocks)"]
    assert {"level", "what", "do"} == set(found["findings"][0])


def test_configs_are_written_as_a_program_has_them(tmp_path):
    recipe = fastcache.Recipe(fastcache.Interval(3), fastcache.Taylor(1))
    saved = recipe.save(tmp_path / "r.json")
    measured = fastcache.Calibration([1.0, 0.9]).save(tmp_path / "c.json")
    plain = tmp_path / "s.json"
    plain.write_text('{"config": "firstblock", "threshold": 0.2}')
    names = {"fastcache": fastcache}
    for text in (
        "quality",
        "firstblock",
        '{"config": "MagCacheConfig", "mag_ratios": [1.0, 0.9], "num_inference_steps": 2}',
        '{"when": {"Interval": {"n": 3}}, "what": {"Taylor": {"order": 1}}}',
        str(saved),
        str(measured),
        str(plain),
    ):
        given = config_from(text)
        found = eval(written(text, given), names)
        settings = fastcache.enable(patients.eval_model(), found)
        assert settings.recipe == fastcache.enable(patients.eval_model(), given).recipe, text
    assert written(str(plain), config_from(str(plain))) == (
        "fastcache.FirstBlockCacheConfig(threshold=0.2)"
    )


def test_the_demo_model(capsys):
    pytest.importorskip("diffusers")
    status, text = command(capsys, "demo")
    assert status == 0 and "transformer_blocks (2 blocks)" in text
    assert isinstance(target_from("demo")[0], nn.Module)


def test_steps_of_a_pipeline():
    assert steps_of(patients.pipe) == 12 and steps_of(patients.model) == 28
    assert steps_of(functools.partial(print)) == 28
