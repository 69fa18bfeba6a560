# SPDX-License-Identifier: Apache-2.0
"""Render committed results: the tables and pictures of README and docs, and everything as one HTML page.

    python -m bench report --write          update the tables and pictures
    python -m bench report --check          exit 1 where a table is stale
    python -m bench report --html FILE      every setting that was measured, in one file

Tables are a function of bench/results alone, so a check needs no measurement and no plotting library.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import (
    claims,
    common,
    figures,
    load_tables,
    quality_figures,
    snippets,
    training_tables,
    tune_tables,
)
from .common import RESULTS, ROOT, Row
from .page import QUALITY_IMAGES, blocks, plain
from .render import to_html

IMAGES = "docs/images"


def results(folder: Path = RESULTS) -> list[Row]:
    return [row for path in sorted(folder.glob("*.jsonl")) for row in common.read_lines(path)]


def draw(rows: list[Row], folder: Path) -> None:
    """The pictures that the pages refer to."""

    def of(model: str, rows: list[Row]) -> list[Row]:
        return [r for r in rows if (r["model"], r["dtype"]) == (model, "fp32")]

    def first(rows: list[Row]) -> list[Row]:
        return [r for r in of("flux", plain(rows)) if r["steps"] == 28]

    def curves(rows: list[Row]) -> list[Row]:
        return tune_tables.curve_of(rows)

    makers = {
        "ops": ("ops", figures.ops_figure, list),
        "overhead": ("overhead", figures.overhead_figure, list),
        "steps": ("steps", figures.steps_figure, list),
        "load": ("load", load_tables.load_figure, list),
        "own": ("steps", figures.own_figure, figures.own_rows),
        "guided": ("quality", quality_figures.guided_figure, plain),
        "frontier": ("quality", quality_figures.frontier_figure, first),
        "more-steps": ("tune", tune_tables.more_steps_figure, curves),
        "training": ("training", training_tables.loss_figure, list),
    }
    for model, name in QUALITY_IMAGES.items():
        makers[name] = ("quality", quality_figures.quality_figure, partial(of, model))
    for name, (bench, make, choose) in makers.items():
        for kind in ("cpu", "cuda"):
            part = choose([r for r in rows if r["bench"] == bench and r["kind"] == kind])
            if part:
                figures.save(make(part), folder / f"bench-{name}-{kind}.svg")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--write", action="store_true", help="update the README, docs and pictures")
    p.add_argument("--check", action="store_true", help="exit 1 where a table is stale")
    p.add_argument("--html", type=Path, metavar="FILE", help="write everything as one page")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON lines")
    p.add_argument("--root", type=Path, default=ROOT, help="where docs/ and README.md are")
    args = p.parse_args(argv)
    rows = results(args.results)
    pages = {path: snippets.fill(path.read_text(), rows) for path in marked(args.root)}
    if args.write:
        draw(rows, args.root / IMAGES)
        for path, text in pages.items():
            path.write_text(text)
        print(f"wrote {IMAGES} and the tables of {', '.join(sorted(p.name for p in pages))}")
    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(to_html(list(blocks(rows)), args.root / IMAGES))
        print(f"wrote {args.html}")
    stale = [p for p, text in pages.items() if args.check and p.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(args.root)} is stale: run `python -m bench report --write`")
    if not (args.write or args.check or args.html):
        for claim in claims.all_claims(rows):
            verdict = "met" if claim.met else "NOT met"
            print(f"{verdict:<8}{claim.text}: {claim.found} ({claim.bound})")
    return int(bool(stale))


def marked(root: Path) -> Iterator[Path]:
    """Pages with tables between markers."""
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if path.exists() and snippets.MARKED.search(path.read_text()):
            yield path


if __name__ == "__main__":
    raise SystemExit(main())
