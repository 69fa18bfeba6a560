# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs. matplotlib is imported when something is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..policies import COMPUTE, REUSE
from ..recipe import Recipe
from ..runtime.stats import Record, Stats
from .figure import COLOURS, INK, PALE, ROWS, new_figure, save_figure, tidy_axes
from .summary import describe

Key = tuple[str, Any, str]  # model, request, context

# What a policy holds against its threshold, as an axis says it.
WEIGHED = {
    "": "signal",
    "change": "change of the first block\n(relative L1)",
    "error": "accumulated error",
    "misfit": "misfit of the guide\n(relative L2)",
}


def plot_run(stats: Stats, recipe: Recipe, held: dict[str, int], path: str | Path) -> Path:
    """Draw the latest run of every context: signal against threshold, decisions, bytes held.

    stats: all records. recipe: what the cache runs. held: bytes by what holds them. path: of the picture.
    Raises ImportError without matplotlib, ValueError before the first denoiser call.
    """
    runs = _latest_runs(stats)
    if not runs:
        raise ValueError("plot: no denoiser call yet; run the model first")
    signals = {key: run for key, run in runs.items() if any(_drawable(r) for r in run)}
    heights = [2.9] * bool(signals) + [0.5 + 0.34 * len(runs)] + [0.42] * bool(held)
    figure = new_figure(9.6, sum(heights) + 1.1)
    axes = figure.subplots(len(heights), gridspec_kw={"height_ratios": heights})
    panels = list(axes) if len(heights) > 1 else [axes]
    colours = dict(zip(runs, (COLOURS * ROWS)[: len(runs)], strict=True))
    figure.suptitle(_headline(recipe, runs), x=0.012, ha="left", fontsize=12.5, color=INK)
    if signals:
        _draw_signals(panels.pop(0), recipe, signals, colours)
    _draw_strips(panels.pop(0), runs, colours)
    if held:
        _draw_bytes(panels.pop(0), held)
    return save_figure(figure, path)


def _latest_runs(stats: Stats) -> dict[Key, list[Record]]:
    keys = dict.fromkeys((r.model, r.request, r.context) for r in stats)
    return {key: stats.last_run(*key) for key in list(keys)[-ROWS:]}


def _drawable(record: Record) -> bool:
    return (
        record.threshold is not None and record.signal is not None and math.isfinite(record.signal)
    )


def _headline(recipe: Recipe, runs: dict[Key, list[Record]]) -> str:
    records = [r for run in runs.values() for r in run]
    reused = sum(r.action == REUSE for r in records)
    models = ", ".join(dict.fromkeys(model for model, _, _ in runs))
    rules = " + ".join(map(describe, recipe.rules))
    name = rules if recipe.name == "Recipe" else recipe.name
    return (
        f"{name} on {models}: {reused} of {len(records)} calls reused ({reused / len(records):.0%})"
    )


def _names(runs: dict[Key, list[Record]]) -> dict[Key, str]:
    """A short name per context: what tells it from the others."""
    models, requests = {k[0] for k in runs}, {k[1] for k in runs}
    return {
        (model, request, context): " ".join(
            [model] * (len(models) > 1) + [f"{request}"] * (len(requests) > 1) + [context]
        )
        for model, request, context in runs
    }


def _draw_signals(
    axes: Any, recipe: Recipe, runs: dict[Key, list[Record]], colours: dict[Key, str]
) -> None:
    """One line per context; filled points were computed, open ones reused."""
    names = _names(runs)
    for key, run in runs.items():
        seen = [r for r in run if _drawable(r)]
        steps, values = [r.step for r in seen], [r.signal for r in seen]
        axes.plot(steps, values, color=colours[key], lw=1.4, alpha=0.55, label=names[key])
        for action, face in ((REUSE, "white"), (COMPUTE, colours[key])):
            at = [i for i, r in enumerate(seen) if r.action == action]
            axes.scatter(
                [steps[i] for i in at],
                [values[i] for i in at],
                s=26,
                facecolor=face,
                edgecolor=colours[key],
                linewidth=1.3,
                zorder=3,
            )
    threshold = next(r.threshold for run in runs.values() for r in run if _drawable(r))
    axes.axhline(threshold, color=INK, lw=1.2, ls="--", zorder=1)
    axes.annotate(
        f"threshold {threshold:g}",
        (1.01, threshold),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
        color=INK,
    )
    axes.set_ylabel(WEIGHED[recipe.rules[0].when.weighs])
    axes.set_title(
        "filled: computed, open: reused", fontsize=9.5, color=INK, loc="right", style="italic"
    )
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend(
            frameon=False,
            fontsize=9,
            ncols=min(len(runs), 4),
            loc="lower left",
            bbox_to_anchor=(0, 0.99),
            borderaxespad=0,
        )
    tidy_axes(axes)
    axes.set_xlim(*_span(runs))


def _draw_strips(axes: Any, runs: dict[Key, list[Record]], colours: dict[Key, str]) -> None:
    """One row per context, one cell per step; pale cells were reused, by some rules or by all."""
    names = _names(runs)
    for row, (key, run) in enumerate(runs.items()):
        for r in run:
            share = sum(a == REUSE for a in r.actions) / len(r.actions) if r.actions else 0
            axes.barh(
                row,
                0.9,
                left=r.step - 0.45,
                height=0.72,
                color=PALE if r.action == REUSE else colours[key],
                edgecolor=colours[key],
                linewidth=0.7,
                hatch="////" if 0 < share < 1 else None,
            )
        computed = sum(r.action != REUSE for r in run)
        axes.annotate(
            f"{computed}/{len(run)} computed",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(range(len(runs)), [names[key] for key in runs])
    axes.set(xlabel="step", xlim=_span(runs), ylim=(len(runs) - 0.45, -0.55))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, colors=INK)


def _draw_bytes(axes: Any, held: dict[str, int]) -> None:
    """One stacked bar of what the cache holds."""
    left = 0.0
    for (name, size), colour in zip(held.items(), COLOURS * ROWS, strict=False):
        axes.barh(
            0, size / 2**20, left=left, color=colour, alpha=0.75, label=f"{name} {_mib(size)}"
        )
        left += size / 2**20
    axes.set(yticks=[], xlabel="MiB held by the cache", xlim=(0, left * 1.001))
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=min(len(held), 4),
        loc="lower left",
        bbox_to_anchor=(0, 0.96),
        borderaxespad=0,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK)


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"


def _span(runs: dict[Key, list[Record]]) -> tuple[float, float]:
    steps = [r.step for run in runs.values() for r in run]
    return min(steps) - 0.7, max(steps) + 0.7
