# SPDX-License-Identifier: Apache-2.0
"""Tables of kernels, steps, graphs and Python cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from . import overhead as python_cost
from .common import Row
from .tables import markdown, of

KERNELS = (
    ("first-block change and store", "residual_l1 + store", "FLUX"),
    ("first-block change and store", "residual_l1 + store", "CogVideoX"),
    ("weighted sum of 3 (Taylor)", "linear_combine of 3", "FLUX"),
    ("weighted sum of 3 (Taylor)", "linear_combine of 3", "CogVideoX"),
    ("apply a residual", "residual_apply", "FLUX"),
)


def kernels(rows: Sequence[Row]) -> str:
    """C++ kernels against diffusers' eager chains and torch.compile, fp32 and bf16."""
    lines = []
    for name, op, model in KERNELS:
        cells: dict[str, list[str]] = {"diffusers": [], "compile": [], "copy": []}
        here = of(rows, "ops", op=op, model=model)
        for dtype in ("fp32", "bf16"):
            cell = {r["contender"]: r for r in here if r["dtype"] == dtype}
            if "C++" not in cell:
                continue
            ours = cell["C++"]
            compiled = [cell[c]["p50"] for c in ("compile", "compile out=") if c in cell]
            if "diffusers" in cell:
                cells["diffusers"].append(f"{cell['diffusers']['p50'] / ours['p50']:.1f}×")
            if compiled:
                cells["compile"].append(f"{min(compiled) / ours['p50']:.2f}×")
            cells["copy"].append(f"{ours['of_copy']:.0%}")
        if here:
            shape = "×".join(map(str, here[0]["shape"]))
            lines.append((name, shape, *(" / ".join(c) for c in cells.values())))
    columns = ("op", "shape", "against diffusers", "against torch.compile", "of a copy's bandwidth")
    return markdown(columns, lines) if lines else ""


def overhead(rows: Sequence[Row]) -> str:
    """Python cost of a skipped step, as a share of diffusers' hooks."""
    here = of(rows, "overhead")
    value = {c["claim"]: f"{c['value']:.2f}×" for c in python_cost.claims(here)}
    cases = {r["case"]: r["p50"] for r in here}
    lines = []
    for method in ("MagCache", "FirstBlock"):
        ours, theirs = cases.get(f"{method}, fastcache"), cases.get(f"{method}, diffusers")
        if ours and theirs:
            lines.append((f"{method}, 57 trivial blocks, eager", f"{ours / theirs:.2f}×"))
    for want in python_cost.WANT:
        if want.floors and want.claim in value:
            kind, how = (
                "FLUX's 57" if "FLUX" in want.ours else "57 trivial",
                want.ours.split(", ")[-1],
            )
            lines.append((f"MagCache, {kind} blocks, `{how}`, own cost", value[want.claim]))
    return (
        markdown(("a skipped step", "Python time against diffusers' hooks, eager"), lines)
        if lines
        else ""
    )


def steps(rows: Sequence[Row]) -> str:
    """Reused steps and whole runs against both peers, trained model, eager."""
    here = of(rows, "steps", model="digits", compiled="")
    at = {(r["system"], r["method"], r["batch"]): r for r in here}
    batches = sorted({r["batch"] for r in here})
    lines = []
    for method in dict.fromkeys(r["method"] for r in here if r["system"] == "fastcache"):
        for peer in ("diffusers", "cache-dit"):
            sides = ("fastcache", peer)
            pairs = {b: [at.get((s, method, b)) for s in sides] for b in batches}
            known = {b: (ours, other) for b, (ours, other) in pairs.items() if ours and other}
            if not known:
                continue
            times = [
                " / ".join(f"{ours[k] / other[k]:.2f}×" for ours, other in known.values())
                for k in ("reused_ms", "run_p50")
            ]
            counted = known.get(8, next(iter(known.values())))
            counts = [
                " / ".join(f"{r[k] / unit:.0f}" for r in counted if r.get(k) is not None)
                for k, unit in (("launches", 1), ("cache_bytes", 1024))
            ]
            lines.append((method, peer, *times, *counts))
    names = " / ".join(map(str, batches))
    columns = ("method", "against", f"reused step, batch {names}", f"whole run, batch {names}")
    columns += ("launches, ours / theirs", "cache KiB, ours / theirs")
    return markdown(columns, lines) if lines else ""


def graphs(rows: Sequence[Row]) -> str:
    """Means, and in brackets the most, under torch.compile by system and entry."""
    here = [r for r in of(rows, "graphs", backend="capture") if r["system"] != "uncached"]
    lines = []
    for key in dict.fromkeys((r["system"], r["entry"]) for r in here):
        mine = [r for r in here if (r["system"], r["entry"]) == key]
        ran = [r for r in mine if "error" not in r]
        counts = [[r[k] for r in ran] for k in ("graphs", "breaks", "recompiles")]
        most = [f"{statistics.mean(c):.1f} ({max(c)})" if any(c) else "0" for c in counts]
        full = sum(r["fullgraph"] == "yes" for r in ran)
        tried = f"{len(ran)} of {len(mine)}"
        lines.append((key[0], f"`{key[1]}`", tried, *most, f"{full} of {len(ran)}"))
    columns = ("", "compiled by", "models × methods that ran")
    columns += ("graphs", "breaks", "recompiles", "fullgraph")
    return markdown(columns, lines) if lines else ""
