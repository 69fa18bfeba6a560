# SPDX-License-Identifier: Apache-2.0
"""The workflows of a public forge: their commands exist, their rights are few, and what they name is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import release

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.skipif(not FILES, reason="needs the tree")


def loaded(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in FILES:
        for name, job in loaded(path)["jobs"].items():
            yield f"{path.stem}/{name}", job


JOBS = dict(jobs())
MATRIX = re.compile(r"\$\{\{ matrix\.(\w+) \}\}")


def commands(job: dict[str, Any]) -> list[str]:
    """What its steps run, once for every value that a matrix puts there."""
    found = [step["run"] for step in job.get("steps", ()) if "run" in step]
    values = job.get("strategy", {}).get("matrix", {})
    for name in {name for text in found for name in MATRIX.findall(text)}:
        mark = f"${{{{ matrix.{name} }}}}"
        found = [t.replace(mark, v) for t in found for v in (values[name] if mark in t else [""])]
    return found


COMMANDS = sorted(
    {line for job in JOBS.values() for text in commands(job) for line in text.split("\n")}
)


def test_there_is_something_to_read():
    assert {f.stem for f in FILES} >= {"checks", "docs", "release", "wheels"}
    assert {"make lint", "make test", "make test-torch", "make site"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_what_make_is_asked_for_exists(command):
    """A dry run of it, which make refuses where there is no rule."""
    words = command.replace("$GITHUB_REF_NAME", "v0").split(">")[0].replace('"', "").split()
    run = subprocess.run([*words, "-n", "PIP_FLAGS="], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (target,) = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
    assert target in re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make ")])
def test_what_else_is_run_is_there(command):
    for name in re.findall(r"\b[\w/]+\.py\b", command):
        assert (ROOT / name).is_file(), name
    assert command.split()[0] in ("python", "pipx", "gh")


@pytest.mark.parametrize("name", JOBS)
def test_jobs_end_and_need_what_exists(name):
    job = JOBS[name]
    workflow = name.split("/")[0]
    needs = job.get("needs", [])
    for other in [needs] if isinstance(needs, str) else needs:
        assert f"{workflow}/{other}" in JOBS
    if "uses" in job:
        called = loaded(ROOT / job["uses"])
        assert "workflow_call" in called[True]  # which is how YAML 1.1 reads `on`
        return
    assert job["runs-on"] and job["timeout-minutes"] <= 90
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w./-]+@(v\d+|release/v1)", step.get("uses", "a@v1"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_rights_are_given_by_the_job(path):
    held = loaded(path)
    assert held["permissions"] == {"contents": "read"}
    assert "secrets." not in path.read_text() and "pull_request_target" not in held[True]
    given = {right for job in held["jobs"].values() for right in job.get("permissions", {})}
    assert given <= {
        "release": {"id-token", "contents"},
        "docs": {"pages", "id-token"},
    }.get(path.stem, set())


def test_pythons_are_supported_and_the_wheel_meets_each_of_them():
    pyproject = (ROOT / "pyproject.toml").read_text()
    oldest = tuple(map(int, re.search(r'requires-python = ">=(\d+)\.(\d+)"', pyproject).groups()))
    fast = JOBS["checks/fast"]["strategy"]["matrix"]["python"]
    matrix = JOBS["wheels/clean"]["strategy"]["matrix"]
    assert set(fast) < set(matrix["python"])
    assert min(tuple(map(int, p.split("."))) for p in matrix["python"]) == oldest
    left = {(p, t) for p in matrix["python"] for t in matrix["torch"]}
    left -= {(gone["python"], gone["torch"]) for gone in matrix["exclude"]}
    assert {p for p, _ in left} == set(matrix["python"])
    assert {t for _, t in left} == set(matrix["torch"])
    pinned = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    pinned += re.findall(r"^torch==(\S+)", (ROOT / "constraints-torch.txt").read_text(), re.M)
    assert set(pinned) < set(matrix["torch"])


def test_a_release_agrees_with_its_tag(capsys):
    import fastcache

    assert release.main([f"v{fastcache.__version__}"]) == 0
    assert capsys.readouterr().out.count("\n- ") > 3
    assert release.main(["v9.9.9"]) == 1
    assert "the tag is 'v9.9.9', but fastcache/__init__.py has" in capsys.readouterr().err
    assert release.main([]) == 1
