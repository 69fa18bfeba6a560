# SPDX-License-Identifier: Apache-2.0
"""What a stranger finds beside the code: versions that agree, hooks that run what `make lint` runs, words, licences."""

from __future__ import annotations

import re
from pathlib import Path

import house
import pytest
import words

import fastcache

ROOT = Path(__file__).parents[2]
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.skipif(not (ROOT / "CITATION.cff").exists(), reason="needs the tree")


def loaded(name: str):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_version_is_one():
    assert loaded("CITATION.cff")["version"] == fastcache.__version__
    sections = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == fastcache.__version__ and len(sections) == len(set(sections))


def test_the_citation_has_what_the_format_needs():
    """Citation File Format 1.2.0."""
    held = loaded("CITATION.cff")
    assert held["cff-version"] == "1.2.0" and held["type"] == "software"
    assert {"message", "title", "authors"} <= set(held) and held["license"] == "Apache-2.0"
    assert all(set(author) <= {"name", "given-names", "family-names"} for author in held["authors"])


def test_hooks_run_what_make_lint_runs():
    makefile = (ROOT / "Makefile").read_text()
    lint = re.search(r"^lint: venv\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    wanted = [line.strip().replace("$(BIN)", ".venv/bin") for line in lint.splitlines()]
    hooks = [hook for repo in loaded(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == [line.removesuffix(" .") for line in wanted]


@pytest.mark.parametrize("name", ["fault", "model"])
def test_issue_forms_are_forms(name):
    form = loaded(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("input", "textarea") and field["attributes"]["label"]


def test_every_source_names_its_licence_and_writing_it_does_so_once(tmp_path, monkeypatch):
    assert not house.unlicensed()
    (tmp_path / "tests").mkdir()
    plain, script = tmp_path / "setup.py", tmp_path / "tests" / "a.sh"
    plain.write_text("import sys\n")
    script.write_text("#!/bin/sh\ntrue\n")
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.unlicensed() == [plain, script]
    house.license_files()
    house.license_files()
    assert plain.read_text() == f"# {house.LICENCE}\nimport sys\n"
    assert script.read_text() == f"#!/bin/sh\n# {house.LICENCE}\ntrue\n"


SAMPLES = (
    "a blaz" "ing speed", "it lever" "ages it", "# TO" "DO: later", "in /ro" "ot/x", "--index-" "url https://x",
    "<<<<" "<<< HEAD",
)  # fmt: skip


def test_words_that_do_not_belong_here_are_found(tmp_path, capsys):
    assert len(SAMPLES) == len(words.BANNED)
    for number, text in enumerate(SAMPLES):
        path = tmp_path / f"{number}.md"
        path.write_text(f"# A page\n{text}\n")
        assert words.main([str(path)]) == 1
        assert f"{path}:2: " in capsys.readouterr().out
    good = tmp_path / "good.md"
    good.write_text("Measured at home: 1.5 times as fast. github.com/root/x\n")
    assert words.main([str(good)]) == 0
