# SPDX-License-Identifier: Apache-2.0
"""How far the presets, and the best settings, are ahead of other systems: the smallest lead over all trained models."""

from __future__ import annotations

from collections.abc import Sequence

from . import quality_tables
from .cells import frontier
from .common import Row
from .quality_tables import COMMITTED, NAMED, SIZES, is_named, trained
from .tables import markdown

PEERS = {"diffusers": "diffusers' hooks", "cache-dit": "cache-dit", "uncached": "fewer steps"}
PRESETS = "`preset"  # how their names begin
RANKED = (PRESETS, "0 1 2")  # and those of all settings that are compared
SLACK = 0.005  # of the uncached run's compute, which reused steps may differ by


def peers(
    rows: Sequence[Row],
    column: str = "psnr",
    models: Sequence[str] = COMMITTED,
    ranked: str | tuple[str, ...] = RANKED,
) -> str:
    """Leads in dB of each preset, and of what may replace one, over the best of each peer at its compute, and the
    smallest of them; 28 steps.

    column: "psnr", to the uncached run, or "psnr_solution", to a run of 100 steps.
    """
    return _leads(trained(rows, models), column, ranked)


def _leads(cells: dict[str, list[Row]], column: str, ranked: str | tuple[str, ...]) -> str:
    lines = []
    for name, key in NAMED.items():
        if not name.startswith(ranked):
            continue
        found = [next((r for r in here if is_named(r, key)), None) for here in cells.values()]
        for system, label in PEERS.items():
            pairs = zip(found, cells.values(), strict=True)
            leads = [None if r is None else _lead(r, here, system, column) for r, here in pairs]
            known = [x for x in leads if x is not None]
            if known:
                shown = ("" if x is None else f"{x:+.1f}" for x in leads)
                lines.append((name, label, *shown, f"**{min(known):+.1f}**"))
    return markdown(("", "over", *cells, "smallest"), lines) if lines else ""


def sizes(rows: Sequence[Row]) -> str:
    """Leads of the presets on the picture models of every size."""
    return peers(rows, models=SIZES, ranked=PRESETS)


def longer(rows: Sequence[Row]) -> str:
    """Leads of the presets in runs of 50 steps."""
    return _leads(trained(rows, steps=50), "psnr", PRESETS)


def elsewhere(rows: Sequence[Row]) -> str:
    """Leads of the presets on the picture model in cells that they were not chosen on."""
    return _leads(quality_tables.elsewhere_cells(rows), "psnr", PRESETS)


def converged(rows: Sequence[Row], models: Sequence[str] = (*COMMITTED, *SIZES)) -> str:
    """The presets that name 50 steps beside the usual 28 without a cache: dB to the converged picture."""
    lines = []
    for name in dict.fromkeys(models):
        for guidance in ("none", "sequential"):
            usual, longer = (
                quality_tables.cell(rows, steps, guidance, model=name) for steps in (28, 50)
            )
            own = next((r for r in longer if r["setting"] == "preset converged/50"), None)
            whole = {r["steps"]: r for r in (*usual, *longer) if r["method"] == "uncached"}
            if own is None or len(whole) < 2:
                continue
            title = f"{name}, {'no guidance' if guidance == 'none' else 'guidance'}"
            known = [whole[28], own, whole[50]]
            shown = [f"{r['psnr_solution']:.1f}" for r in known]
            cost = own["compute"] * 50 / 28
            ahead = own["psnr_solution"] - whole[28]["psnr_solution"]
            lines.append((title, *shown[:2], f"**{ahead:+.1f}**", f"{cost:.0%}", shown[2]))
    columns = ("", "28 steps", "50 steps, 14 computed", "ahead", "cost", "50 steps")
    return markdown(columns, lines) if lines else ""


def ranks(rows: Sequence[Row]) -> str:
    """Places of the named settings by their lead over fewer steps that cost no more, in each cell; 28 steps."""
    cells = trained(rows)
    placed: list[dict[str, int]] = []
    for here in cells.values():
        known = {
            name: lead
            for name, key in NAMED.items()
            for row in here
            if is_named(row, key) and (lead := _lead(row, here, "uncached", "psnr")) is not None
        }
        order = sorted(known, key=lambda name: -known[name])
        placed.append({name: place for place, name in enumerate(order, 1)})
    lines = []
    for name in NAMED:
        places = [cell.get(name) for cell in placed]
        found = [place for place in places if place is not None]
        if found:
            shown = ("" if place is None else place for place in places)
            lines.append((name, *shown, f"{min(found)} to {max(found)}"))
    return markdown(("", *cells, "places"), lines) if lines else ""


def _lead(row: Row, here: Sequence[Row], system: str, column: str) -> float | None:
    """Over the best of a system that costs no more; None where it has nothing so cheap."""
    others = [
        r[column]
        for r in here
        if r["system"] == system
        and r.get("psnr") is not None
        and r["compute"] <= row["compute"] + SLACK
    ]
    return row[column] - max(others) if others else None


def smallest(rows: Sequence[Row]) -> str:
    """By budget: the smallest lead of a model's best setting over each peer's best, and on which model; 28 steps."""
    cells = {name: frontier(here) for name, here in trained(rows).items()}
    lines = []
    for lines_of_budget in zip(*cells.values(), strict=True):
        found = []
        for system in PEERS:
            leads = [
                (line["fastcache"] - line[system], name)
                for name, line in zip(cells, lines_of_budget, strict=True)
                if line["fastcache"] is not None and line[system] is not None
            ]
            lead, name = min(leads, default=(None, ""))
            found.append("" if lead is None else f"{lead:+.1f} ({name})")
        lines.append((f"{lines_of_budget[0]['budget']:.0%}", *found))
    columns = ("compute at most", *(f"over {label}" for label in PEERS.values()))
    return markdown(columns, lines) if lines else ""
