# SPDX-License-Identifier: Apache-2.0
"""The site before it is built: every document and public name has its place, pages that are made say what is true."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastcache
from fastcache import ops

ROOT = Path(__file__).parents[2]
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="needs the tree")


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "docs" / "_site"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "docs" / "_site"))


@pytest.fixture(scope="module")
def pages(site) -> Any:
    return site("pages")


def listed(nav: list[Any]) -> list[str]:
    """Paths in a table of contents."""
    found: list[str] = []
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += [value] if isinstance(value, str) else listed(value)
    return found


def test_every_document_is_in_the_table_of_contents(pages):
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    written = {p.name for p in (ROOT / "docs").glob("*.md")}
    assert sorted(listed(nav)) == sorted(written | set(pages.COPIED))


def test_every_public_name_stands_on_one_page_of_the_reference(pages):
    found = [
        n
        for text in dict(pages.reference()).values()
        for n in re.findall(r"^::: (\S+)$", text, re.M)
    ]
    public = {f"fastcache.{n}" for n in fastcache.__all__} - {"fastcache.ops"}
    assert sorted(found) == sorted(public | {f"fastcache.ops.{n}" for n in ops.__all__})


def test_a_name_from_nowhere_is_an_error(pages):
    with pytest.raises(ValueError, match="add it to GROUPS"):
        pages.group_of("nowhere.at_all")


def test_pages_that_are_copied_lead_to_pages(pages):
    made = pages.generated()
    for name in pages.COPIED:
        for target in re.findall(r"\]\(([^)#\s]+)", made[name]):
            known = target in made or (ROOT / "docs" / target).exists()
            assert known or target.startswith("http"), f"{name}: {target}"
    assert "[Quick start](quick-start.md)" in made["index.md"]
    assert "(images/bench-frontier-cpu.svg)" in made["index.md"]


def test_what_a_built_page_lacks_is_found(site, pages, tmp_path):
    check = site("check")
    (tmp_path / "reference").mkdir()
    title = '<span class="doc-section-title">Raises:</span>'
    for page, *_ in pages.GROUPS:
        held = "".join(f'<h2 id="{n}">{title} ValueError</h2>' for n in pages.names_on(page))
        (tmp_path / "reference" / f"{page}.html").write_text(held)
    assert check.main(tmp_path) == 0
    path = tmp_path / "reference" / "models.html"
    text = path.read_text().replace('id="fastcache.Block"', 'id="x"')
    path.write_text(text.replace(title, "<p>Raises:", 1) + '<script src="https://x/y.js"></script>')
    found = check.lacking(tmp_path)
    assert (
        any(n.startswith("fastcache.Block is not on models.html") for n in found)
        and len(found) == 1
    )
    assert check.foreign(tmp_path) == ['reference/models.html fetches <script src="https://']
    path.write_text(text.replace(title, "<p>Raises:"))
    assert "fastcache.BlockAdapter: Raises of its docstring was not understood" in check.lacking(
        tmp_path
    )


def test_the_page_of_models_says_what_the_matrix_holds():
    pytest.importorskip("diffusers", minversion="0.42")
    import matrix_page

    assert matrix_page.PAGE.read_text() == matrix_page.page(), "python tests/matrix_page.py --write"
    known = dict(matrix_page.rows())
    assert known["FluxTransformer2DModel"]["FirstBlock"] == "" and len(known) > 60
