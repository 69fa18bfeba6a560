# SPDX-License-Identifier: Apache-2.0
"""The pictures of the benchmarks. Every function takes rows as the benchmarks write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contenders import PASSES
from .vector import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Row = dict[str, Any]


INK = "#1f2933"


GREY = "#8a94a3"


COLOURS = {
    "diffusers": "#d9822b",
    "cache-dit": "#b85c9e",
    "compile": "#9aa5b1",
    "compile out=": "#616e7c",
    "reference": "#cbd2d9",
    "C++": "#2f6db3",
    "Triton": "#3a8f5c",
    "CUDA": "#76b82a",
    "fastcache": "#2f6db3",
    "fewer steps": "#616e7c",
    "uncached": INK,
}


def new(rows: int = 1, columns: int = 1, width: float = 10.0, height: float = 4.0) -> Any:
    """A figure and its axes, [rows][columns], in the house style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "fc"}
    )
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.set_layout_engine("constrained")
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a picture, by the ending of its name: SVG, which scales, or what else matplotlib knows."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def colour(name: str, index: int = 0) -> str:
    spare = ("#8458b3", "#b8860b", "#20808d", "#a03b6b", "#c8553d")
    return COLOURS.get(name, spare[index % len(spare)])


def ops_figure(rows: Sequence[Row]) -> Figure:
    """Share of the copy bandwidth by op, one panel per shape and dtype."""
    panels = list(dict.fromkeys((r["model"], r["dtype"]) for r in rows))
    names = list(dict.fromkeys(r["op"] for r in rows))
    shown = [c for c in COLOURS if any(r["contender"] == c for r in rows)]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = new(lines, columns, 7.2 * columns, 0.9 + 0.62 * len(names) * lines)
    for i, (model, dtype) in enumerate(panels):
        axis = axes[i // columns][i % columns]
        height = 0.84 / len(shown)
        for k, contender in enumerate(shown):
            at, widths = [], []
            for j, op in enumerate(names):
                for r in rows:
                    if (r["model"], r["dtype"], r["op"], r["contender"]) == (
                        model,
                        dtype,
                        op,
                        contender,
                    ):
                        at.append(j - 0.42 + (k + 0.5) * height)
                        widths.append(100 * r["of_copy"])
            axis.barh(at, widths, height * 0.92, color=colour(contender), label=contender)
        shape = next(r["shape"] for r in rows if r["model"] == model)
        axis.axvline(100, color=INK, lw=0.8, ls=":")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(f"{model} {shape[0]}×{shape[1]}, {dtype}", loc="left", weight="bold")
        axis.set_xlabel("% of copy bandwidth, counting the fewest passes")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncol=len(labels), frameon=False)
    return figure


def overhead_figure(rows: Sequence[Row]) -> Figure:
    """Microseconds per skipped step, logarithmic."""
    figure, axes = new(1, 1, 8.6, 0.9 + 0.34 * len(rows))
    axis = axes[0][0]
    names = [r["case"] for r in rows]
    values = [r["p50"] * 1e6 for r in rows]
    colours = [colour(r["system"]) if r["system"] in COLOURS else GREY for r in rows]
    axis.barh(range(len(rows)), values, 0.7, color=colours)
    for i, value in enumerate(values):
        axis.text(value * 1.05, i, f"{value:.3g} µs", va="center", color=INK)
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 2, max(values) * 3)
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set_xlabel("Python time of one step, 57 blocks of next to no work")
    return figure


def steps_figure(rows: Sequence[Row]) -> Figure:
    """A reused step as a share of an uncached one, by method and system, one panel per model and batch."""
    whole = {
        (r["model"], r["batch"]): r["computed_ms"]
        for r in rows
        if r["method"] == "uncached" and not r["compiled"]
    }
    rows = [r for r in rows if r.get("reused_ms") is not None and not r["compiled"]]
    rows = [r for r in rows if r["system"] != PASSES]
    panels = [p for p in dict.fromkeys((r["model"], r["batch"]) for r in rows) if p in whole]
    columns = min(2, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure, axes = new(lines, columns, 6.0 * columns, 3.6 * lines)
    systems = list(dict.fromkeys(r["system"] for r in rows))
    for axis, (model, batch) in zip(axes.flat, panels, strict=False):
        here = [r for r in rows if (r["model"], r["batch"]) == (model, batch)]
        methods = list(dict.fromkeys(r["method"] for r in here))
        for place, method in enumerate(methods):
            bars = [r for r in here if r["method"] == method]
            for k, r in enumerate(bars):
                share = 100 * r["reused_ms"] / whole[model, batch]
                at = place + 0.27 * (k - (len(bars) - 1) / 2)
                axis.bar(at, share, 0.25, color=colour(r["system"]))
                axis.text(at, share + 0.6, f"{share:.0f}", ha="center", fontsize=7.5, color=INK)
        axis.set_xticks(range(len(methods)), methods, rotation=20, ha="right")
        axis.set_title(f"{model}, batch {batch}", loc="left", weight="bold")
        axis.set_ylabel("reused step, % of an uncached one")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = [axes[0][0].bar(0, 0, color=colour(s), label=s) for s in systems]
    figure.legend(handles, systems, loc="outside upper center", ncol=len(systems), frameon=False)
    return figure


def own_rows(rows: Sequence[Row]) -> list[Row]:
    """What the picture of own costs shows: where the arithmetic alone was measured too, eager."""
    least = {(r["model"], r["batch"], r["method"]) for r in rows if r["system"] == PASSES}
    return [
        r
        for r in rows
        if (r["model"], r["batch"], r["method"]) in least and "own_ms" in r and not r["compiled"]
    ]


def own_figure(rows: Sequence[Row]) -> Figure:
    """What a reused step costs beyond the modules that must run, and how much of that is arithmetic."""
    panels = list(dict.fromkeys((r["model"], r["batch"]) for r in rows))
    figure, axes = new(1, len(panels), max(6.4, 4.2 * len(panels)), 3.4)
    for axis, (model, batch) in zip(axes.flat, panels, strict=True):
        here = [r for r in rows if (r["model"], r["batch"]) == (model, batch)]
        methods = list(dict.fromkeys(r["method"] for r in here))
        for place, method in enumerate(methods):
            least = next(r for r in here if (r["system"], r["method"]) == (PASSES, method))
            bars = [r for r in here if r["method"] == method and r is not least]
            for k, r in enumerate(bars):
                at, value = place + 0.27 * (k - (len(bars) - 1) / 2), 1e3 * r["own_ms"]
                axis.bar(at, value, 0.25, color=colour(r["system"]), label=r["system"])
                low, high = value - 1e3 * r["own_p20"], 1e3 * r["own_p80"] - value
                axis.errorbar(at, value, [[low], [high]], color=INK, linewidth=0.8, capsize=2)
                axis.text(
                    at, 1e3 * r["own_p80"], f" {value:.0f}", ha="center", va="bottom", fontsize=7.5
                )
            axis.hlines(
                1e3 * least["own_ms"],
                place - 0.42,
                place + 0.42,
                color=INK,
                linestyle="--",
                label=PASSES,
            )
        axis.set_xticks(range(len(methods)), methods)
        axis.set_title(f"{model}, batch {batch}", loc="left", weight="bold")
        axis.set_ylabel("own cost of a reused step, µs")
    found = {
        label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncol=len(found), frameon=False
    )
    return figure
