# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG: what matplotlib drew in fewer bytes, the same for the same rows; and the committed ones."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

pytest.importorskip("bench", reason="needs the source tree")

from bench import figures, quality_figures, report, vector
from bench.page import plain

IMAGES = Path(__file__).parents[2] / "docs" / "images"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
HREF, OLD_HREF = "href", "{http://www.w3.org/1999/xlink}href"


def dots():
    """A figure with a series of dots, a line, and text in two sizes."""
    figure, axes = figures.new(1, 1, 3.0, 2.0)
    axis = axes[0][0]
    axis.scatter([1, 2, 3.14159], [0.5, 2.71828, 1], s=14, color="#1d4f91", alpha=0.35)
    axis.plot([1, 2, 3], [3, 1, 2], "--", marker="x", label="a line")
    axis.set_title("A title", fontsize=8.5)
    axis.legend()
    return figure


def elements(text):
    """Every element of an SVG with the style that it has or inherits."""

    def walk(element, style):
        style = element.get("style", style)
        yield element, style
        for child in element:
            yield from walk(child, style)

    return list(walk(ElementTree.fromstring(text), None))


def test_the_squeezed_picture_is_the_one_that_was_drawn():
    figure, drawn = dots(), io.StringIO()
    figure.savefig(drawn, format="svg", facecolor="white", metadata=vector.NOTHING_OF_THE_RUN)
    whole, small = elements(drawn.getvalue()), elements(vector.squeezed(drawn.getvalue()))
    assert len(whole) == len(small)
    names = {}
    for (before, style), (after, kept) in zip(whole, small, strict=True):
        assert before.tag == after.tag
        if before.get("style"):  # a group around dots now has theirs
            assert style == kept
        for key in ("d", "x", "y", "transform", "width", "height", "viewBox"):
            was, now = before.get(key), after.get(key)
            assert (was is None) == (now is None)
            if was is None:
                continue
            most = 0.051 if key in ("x", "y") else 0.0051
            pairs = zip(NUMBER.findall(was), NUMBER.findall(now), strict=True)
            assert all(abs(float(a) - float(b)) <= most for a, b in pairs), (was, now)
            sizes = [re.findall(r"scale\([^)]*\)", value) for value in (was, now)]
            assert sizes[0] == sizes[1], "glyphs are of another size"
        if before.get("id"):
            names[before.get("id")] = after.get("id")
    assert len(set(names.values())) == len(names), "two things have one name"
    uses = [(b.get(OLD_HREF), a.get(HREF)) for (b, _), (a, _) in zip(whole, small, strict=True)]
    assert any(was for was, _ in uses)
    assert all(names[was[1:]] == now[1:] for was, now in uses if was)


def test_it_is_smaller_and_the_same_each_time(tmp_path):
    plain = tmp_path / "plain.svg"
    dots().savefig(plain)
    for name in ("first.svg", "second.svg"):
        figures.save(dots(), tmp_path / name)
    first, second = ((tmp_path / n).read_bytes() for n in ("first.svg", "second.svg"))
    assert first == second and len(first) < 0.85 * plain.stat().st_size
    assert b"dc:date" not in first and b"Matplotlib v" not in first
    figures.save(dots(), tmp_path / "dots.png")
    assert (tmp_path / "dots.png").read_bytes().startswith(b"\x89PNG")


def test_committed_plots_are_small_and_shown():
    plots = sorted(IMAGES.glob("bench-*"))
    assert plots and {path.suffix for path in plots} == {".svg"}
    for path in plots:
        assert path.stat().st_size < 200_000, path.name
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")
    pages = [report.ROOT / "README.md", *(report.ROOT / "docs").glob("*.md")]
    shown = {n for page in pages for n in re.findall(r"images/([\w.-]+)", page.read_text())}
    missing = [name for name in shown if not (IMAGES / name).exists()]
    assert not missing


def test_committed_plots_are_those_of_the_results(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(path.name))
    for name in ("ops_figure", "overhead_figure", "steps_figure", "own_figure"):
        monkeypatch.setattr(figures, name, lambda rows: None)
    report.draw(report.results(), tmp_path)
    assert sorted(drawn) == sorted(path.name for path in IMAGES.glob("bench-*"))


def test_a_cell_without_a_guide_has_no_panel():
    rows = [r for r in plain(report.results()) if r["kind"] == "cpu"]
    panels = [axis for axis in quality_figures.guided_figure(rows).axes if axis.get_visible()]
    cells = {(r["model"], r["steps"]) for r in rows}
    assert 1 < len(panels) < len(cells)
    assert all(len(axis.get_lines()) > 1 for axis in panels), "a panel with nothing but zero"
