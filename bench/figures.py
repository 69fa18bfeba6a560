"""The pictures of the benchmarks. Every function takes rows as the benchmarks write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def colour(name: str, index: int = 0) -> str:
    spare = ("#8458b3", "#b8860b", "#20808d", "#a03b6b", "#c8553d")
    return COLOURS.get(name, spare[index % len(spare)])


# --- ops ---------------------------------------------------------------------------------------------


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


# --- overhead ----------------------------------------------------------------------------------------


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
    axis.set_xlabel("Python time of one step, 57 trivial blocks")
    return figure


# --- steps -------------------------------------------------------------------------------------------


def steps_figure(rows: Sequence[Row]) -> Figure:
    """Cost of a reused step by method and system, one panel per model and batch."""
    rows = [r for r in rows if r.get("reused_ms") is not None]
    panels = list(dict.fromkeys((r["model"], r["batch"]) for r in rows))
    columns = min(3, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure, axes = new(lines, columns, 4.6 * columns, 3.4 * lines)
    for axis, (model, batch) in zip(axes.flat, panels, strict=False):
        here = [r for r in rows if (r["model"], r["batch"]) == (model, batch)]
        methods = list(dict.fromkeys(r["method"] for r in here))
        systems = list(dict.fromkeys(r["system"] for r in here))
        width = 0.84 / len(systems)
        for k, system in enumerate(systems):
            points = [
                (methods.index(r["method"]) - 0.42 + (k + 0.5) * width, r["reused_ms"])
                for r in here
                if r["system"] == system
            ]
            x, y = zip(*points, strict=True)
            axis.bar(x, y, width * 0.92, color=colour(system, k), label=system)
        axis.set_xticks(range(len(methods)), methods, rotation=20, ha="right")
        axis.set_title(f"{model}, batch {batch}", loc="left", weight="bold")
        axis.set_ylabel("ms per reused step")
        axis.set_yscale("log")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncol=len(labels), frameon=False)
    return figure


# --- quality -----------------------------------------------------------------------------------------


def best_line(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper envelope: points that no cheaper one beats."""
    line: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not line or y > line[-1][1]:
            line.append((x, y))
    return line


FAMILY = {  # marker by system, colour by method
    "fastcache": "o",
    "diffusers": "s",
    "cache-dit": "^",
    "uncached": "x",
}
METHOD_COLOURS = {
    "fewer steps": "#616e7c",
    "FirstBlock": "#2f6db3",
    "MagCache": "#c8553d",
    "Interval": "#3a8f5c",
    "TaylorSeer": "#b8860b",
    "PAB": "#8458b3",
    "FasterCache": "#20808d",
    "DBCache": "#b85c9e",
    "Guided": "#7a1f5c",
}


def quality_figure(rows: Sequence[Row]) -> Figure:
    """PSNR against computed share, one panel per steps and guidance: the frontier of each system."""
    panels = list(dict.fromkeys((r["steps"], r["guidance"]) for r in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = new(lines, columns, 7.4 * columns, 5.2 * lines)
    for axis, (steps, guidance) in zip(axes.flat, panels, strict=False):
        here = [r for r in rows if (r["steps"], r["guidance"]) == (steps, guidance)]
        here = [r for r in here if r["psnr"] is not None and r["compute"] < 0.995]
        for system, marker in FAMILY.items():
            mine = [r for r in here if r["system"] == system]
            for method in dict.fromkeys(r["method"] for r in mine):
                dots = [(r["compute"], r["psnr"], r["predictor"]) for r in mine]
                dots = [d for d, r in zip(dots, mine, strict=True) if r["method"] == method]
                tone = METHOD_COLOURS.get(method, GREY)
                for forecast in (False, True):
                    part = [d for d in dots if (d[2] not in ("", "reuse")) == forecast]
                    axis.scatter(
                        [100 * d[0] for d in part],
                        [d[1] for d in part],
                        s=34,
                        marker=marker,
                        facecolors=tone if forecast or marker == "x" else "none",
                        edgecolors=None if marker == "x" else tone,
                        label=f"{system}: {method}" + (", forecast" if forecast else "")
                        if part
                        else None,
                    )
            line = best_line([(r["compute"], r["psnr"]) for r in mine])
            if len(line) > 1:
                tone = {"uncached": "#616e7c"}.get(system, colour(system))
                axis.plot(
                    [100 * x for x, _ in line],
                    [y for _, y in line],
                    color=tone,
                    lw=1.6 if system == "fastcache" else 1.0,
                    ls="-" if system == "fastcache" else "--",
                    zorder=0,
                )
        guided = "no guidance" if guidance == "none" else f"guidance, {guidance}"
        axis.set_title(f"{steps} steps, {guided}", loc="left", weight="bold")
        axis.set_xlabel("transformer compute, % of uncached")
        axis.set_ylabel("PSNR against the uncached run, dB")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=6.5, frameon=False, ncol=1, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    return figure
