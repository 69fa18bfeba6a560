"""For people: what a run says about its settings, a progress line, and pictures.

Nothing here runs in the hot path. matplotlib and tqdm are imported when something is drawn.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .policies import COMPUTE, REUSE, FirstBlock, Magnitude, TimestepRange
from .policies.magnitude import Calibrate
from .recipe import Recipe, Rule
from .stats import Record

if TYPE_CHECKING:
    from .calibrate import Calibration
    from .runtime import Cache

JUDGED = 4  # shorter runs are not judged
GUARDS = ("first step", "warm-up", "retention", "last step", "no residual yet")


# --- a run in which the cache did nothing, or everything --------------------------------------


def verdict(records: Sequence[Record], recipe: Recipe) -> tuple[str, str]:
    """What is wrong with a finished run, as (kind, message); empty strings where nothing is.

    Wrong is: no step was reused although the settings meant to, or a rule that weighs every step
    reused each one that it was free to choose.
    """
    if len(records) < JUDGED or all(_means_nothing(rule) for rule in recipe.rules):
        return "", ""
    where = f"context {records[0].context!r} of {records[0].model}"
    if not any(r.action == REUSE for r in records):
        reason = _why_nothing(records, recipe)
        return "nothing", f"no step of {len(records)} was reused in {where}: {reason}"
    when = recipe.rules[0].when
    free = [r for r in records if r.reason not in GUARDS]
    if not isinstance(when, FirstBlock | Magnitude) or len(free) < JUDGED:
        return "", ""
    if all(r.action == REUSE for r in free):
        return "everything", (
            f"each of the {len(free)} steps after warm-up was reused in {where}: the threshold "
            f"{when.threshold:g} was never reached (largest {max(map(_signal, free)):.3g}), so the "
            "result hangs on the first steps alone; lower it, or give the policy max_skips"
        )
    return "", ""


def _means_nothing(rule: Rule) -> bool:
    """Whether a rule asks for every step to be computed."""
    when = rule.when
    if isinstance(when, Calibrate) or getattr(when, "threshold", None) == 0:
        return True
    if isinstance(when, Magnitude):
        return when.max_skip_steps == 0
    return getattr(when, "n", None) == 1 or all(getattr(when, "compute", (False,)))


def _signal(record: Record) -> float:
    return record.signal if record.signal is not None else math.nan


def _why_nothing(records: Sequence[Record], recipe: Recipe) -> str:
    """The reason for a run without reuse, and what to try."""
    free = [r for r in records if r.reason not in GUARDS]
    if not free:
        return (
            f"its {len(records)} steps are all warm-up ({_most_common(records)}); lower warmup or "
            "retention_ratio, or take more steps"
        )
    if all(r.reason == "nothing valid to reuse" for r in free):
        return (
            "the cached values did not outlive a step; is a module called twice, or written into?"
        )
    when = recipe.rules[0].when
    if isinstance(when, TimestepRange):
        return _why_outside(free, when)
    signals = [s for r in free if math.isfinite(s := _signal(r))]
    if isinstance(when, FirstBlock | Magnitude) and signals:
        return (
            f"the smallest {'change' if isinstance(when, FirstBlock) else 'error'} seen, "
            f"{min(signals):.3g}, is above the threshold {when.threshold:g}; raise it, and compare "
            "with running fewer steps (`fastcache calibrate` picks a threshold for a target)"
        )
    if isinstance(when, FirstBlock):
        return (
            "what it measures was never a finite number: the model produced NaN or infinity, or "
            "its first block adds nothing"
        )
    return f"{_most_common(free)}; see cache.summary() and recipe.plan(num_inference_steps)"


def _why_outside(free: Sequence[Record], when: TimestepRange) -> str:
    seen = [r.timestep for r in free if r.timestep is not None]
    if not seen:
        return (
            "no timestep was known; pass timestep= to cache.context, or current_timestep_callback "
            "to the config"
        )
    lo, hi = when.timesteps
    if not any(lo < t < hi for t in seen):
        return (
            f"its timesteps, {max(seen):.4g} to {min(seen):.4g}, are never inside the range {lo:g} "
            f"to {hi:g}; give timesteps in the scheduler's scale (usually 1000 down to 0), or "
            "another range"
        )
    return f"{_most_common(free)}; see recipe.plan(num_inference_steps)"


def _most_common(records: Sequence[Record]) -> str:
    reasons = [r.reason for r in records]
    return max(set(reasons), key=reasons.count) or "no reason noted"


# --- while it runs ----------------------------------------------------------------------------


@contextlib.contextmanager
def progress(cache: Cache, total: int | None = None, **options: Any) -> Iterator[Any]:
    """A tqdm line that counts denoiser calls and shows how many were reused.

    total: calls expected (steps times contexts). options: of `tqdm.tqdm`. Yields the tqdm object.
    """
    bar = _tqdm()(**{"total": total, "unit": "call", "desc": "fastcache", **options})
    reused = 0

    def seen(record: Record) -> None:
        nonlocal reused
        reused += record.action == REUSE
        bar.set_postfix_str(f"reused {reused}/{bar.n + 1}", refresh=False)
        bar.update(1)

    before, cache.stats.watch = cache.stats.watch, seen
    try:
        yield bar
    finally:
        cache.stats.watch = before
        bar.close()


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "the progress line needs tqdm: pip install tqdm, or pip install 'fastcache-dit[bench]'"
        ) from error
    return tqdm


# --- pictures -------------------------------------------------------------------------------------

INK, PALE, GRID = "#1f2933", "#dfe6ee", "#c3ccd6"
COLOURS = ("#2f6db3", "#c8553d", "#3a8f5c", "#8458b3", "#b8860b", "#20808d")
ROWS = 12  # contexts drawn

Key = tuple[str, Any, str]  # model, request, context


def plot_run(cache: Cache, path: str | Path) -> Path:
    """Draw the latest run of every context: signal against threshold, decisions, bytes held.

    Needs matplotlib. Raises ValueError before the first denoiser call.
    """
    runs = _latest_runs(cache)
    if not runs:
        raise ValueError("plot: no denoiser call yet; run the model first")
    signals = {key: run for key, run in runs.items() if any(_drawable(r) for r in run)}
    held = _bytes_held(cache)
    heights = [2.9] * bool(signals) + [0.5 + 0.34 * len(runs)] + [0.42] * bool(held)
    figure = _figure(9.6, sum(heights) + 1.1)
    axes = figure.subplots(len(heights), gridspec_kw={"height_ratios": heights})
    panels = list(axes) if len(heights) > 1 else [axes]
    colours = dict(zip(runs, (COLOURS * ROWS)[: len(runs)], strict=True))
    figure.suptitle(_headline(cache, runs), x=0.012, ha="left", fontsize=12.5, color=INK)
    if signals:
        _draw_signals(panels.pop(0), cache, signals, colours)
    _draw_strips(panels.pop(0), runs, colours)
    if held:
        _draw_bytes(panels.pop(0), held)
    return _save(figure, path)


def plot_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Draw the ratios, the first-block changes and the share of steps that a threshold computes."""
    figure = _figure(13, 3.9)
    axes = figure.subplots(1, 3 if calibration.first_block else 2)
    title = f"calibration of {calibration.model or 'a model'}, {calibration.steps} steps"
    if calibration.scheduler:
        title += f", {calibration.scheduler}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, color=INK)
    _draw_ratios(axes[0], calibration)
    if calibration.first_block:
        _draw_changes(axes[1], calibration)
    _draw_shares(axes[-1], calibration)
    return _save(figure, path)


def _latest_runs(cache: Cache) -> dict[Key, list[Record]]:
    keys = dict.fromkeys((r.model, r.request, r.context) for r in cache.stats)
    return {key: cache.stats.last_run(*key) for key in list(keys)[-ROWS:]}


def _drawable(record: Record) -> bool:
    return (
        record.threshold is not None and record.signal is not None and math.isfinite(record.signal)
    )


def describe(rule: Rule) -> str:
    """A rule in three words."""
    return " × ".join(type(part).__name__ for part in (rule.when, rule.what, rule.where))


def _headline(cache: Cache, runs: dict[Key, list[Record]]) -> str:
    records = [r for run in runs.values() for r in run]
    reused = sum(r.action == REUSE for r in records)
    models = ", ".join(dict.fromkeys(model for model, _, _ in runs))
    rules = " + ".join(map(describe, cache.recipe.rules))
    name = rules if cache.recipe.name == "Recipe" else cache.recipe.name
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


def _draw_signals(axes: Any, cache: Cache, runs: dict, colours: dict[Key, str]) -> None:
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
    first = isinstance(cache.recipe.rules[0].when, FirstBlock)
    axes.set_ylabel("change of the first block\n(relative L1)" if first else "accumulated error")
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
    _tidy(axes)
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


def _bytes_held(cache: Cache) -> dict[str, int]:
    """Bytes per context, and of storage that waits for the next run; empty ones are left out."""
    sizes: dict[str, int] = {}
    for denoiser in cache.denoisers:
        for (request, context), state in denoiser.slots.states.items():
            name = (
                context
                if len({k[0] for k in denoiser.slots.states}) == 1
                else f"{request} {context}"
            )
            if len(cache.denoisers) > 1:
                name = f"{denoiser.name} {name}"
            sizes[name] = sizes.get(name, 0) + state.nbytes()
        spare = sum(state.nbytes() for state in denoiser.slots.spares)
        sizes["for the next run"] = sizes.get("for the next run", 0) + spare
    return {name: size for name, size in sizes.items() if size}


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"


def _draw_ratios(axes: Any, calibration: Calibration) -> None:
    for (name, ratios), colour in zip(calibration.contexts.items(), COLOURS * ROWS, strict=False):
        axes.plot(range(1, len(ratios)), ratios[1:], "o-", ms=3, lw=1.2, color=colour, label=name)
    mean = calibration.mag_ratios
    axes.plot(range(1, len(mean)), mean[1:], color=INK, lw=2, alpha=0.8, label="mean")
    axes.axhline(1.0, color=GRID, lw=1, zorder=0)
    axes.set(xlabel="step", ylabel="|residual| / |residual before|")
    axes.set_title("MagCache's ratios", fontsize=10.5, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)


def _draw_changes(axes: Any, calibration: Calibration) -> None:
    for (name, rows), colour in zip(calibration.first_block.items(), COLOURS * ROWS, strict=False):
        for gap, width in ((1, 1.8), (2, 1.1), (4, 0.7)):
            steps = [i for i, row in enumerate(rows) if len(row) >= gap and row[gap - 1] < 1e29]
            label = name if gap == 1 else None
            values = [rows[i][gap - 1] for i in steps]
            axes.plot(steps, values, color=colour, lw=width, alpha=1.2 - 0.2 * gap, label=label)
    axes.set(xlabel="step", ylabel="relative L1 change")
    axes.set_ylim(bottom=0)
    axes.set_title(
        "first block, against 1 (bold), 2 and 4 steps before", fontsize=10.5, loc="left", color=INK
    )
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)


def _draw_shares(axes: Any, calibration: Calibration) -> None:
    grid = [0.005 * i for i in range(1, 121)]
    plain = {"warmup": 0, "max_skips": 0, "last": False}
    curves = [("MagCache", "-", [calibration.mag_share(t) for t in grid])]
    if calibration.first_block:
        guarded = {"warmup": 4, "max_skips": 0, "last": True}
        for label, style, guards in (
            ("FirstBlock", "-", plain),
            ("FirstBlock, guards of a forecast", "--", guarded),
        ):
            shares = [calibration.first_block_share(t, **guards) for t in grid]
            curves.append((label, style, shares))
    for (label, style, shares), colour in zip(curves, (COLOURS[1], *COLOURS[:1] * 2), strict=False):
        axes.plot(grid, [100 * s for s in shares], style, color=colour, lw=1.7, label=label)
    axes.set(xlabel="threshold", ylabel="steps computed, %", ylim=(0, 102), xlim=(0, grid[-1]))
    axes.set_title("what a threshold computes", fontsize=10.5, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)


def _span(runs: dict[Key, list[Record]]) -> tuple[float, float]:
    steps = [r.step for run in runs.values() for r in run]
    return min(steps) - 0.7, max(steps) + 0.7


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=INK)


def _save(figure: Any, path: str | Path) -> Path:
    figure.savefig(path, dpi=130)
    return Path(path)


def _figure(width: float, height: float) -> Any:
    """A figure of its own, which leaves a notebook's backend and open figures alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib: pip install matplotlib, or pip install "
            "'fastcache-dit[bench]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")
