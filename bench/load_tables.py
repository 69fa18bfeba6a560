# SPDX-License-Identifier: Apache-2.0
"""Tables and a picture of what servers do under load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .common import Row
from .figures import GREY, INK, colour, new
from .tables import markdown, of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How a server batches, by the last word of its name; others are told apart by how many requests they take at a time.
MARKERS = {"mixed": "*", "whole batch": "D"}
# Where the number of a point stands, in points, by how many before it lie close: above, below, to the right.
BESIDE = ((0, 8), (0, -17), (13, -4))


def name_of(row: Row) -> str:
    """A server and its setting, for people."""
    return f"{row['server']}, {row['setting']}"


def is_exact(row: Row) -> bool:
    """Whether its pictures are those without a cache, but for rounding."""
    return row["psnr"] is None or row["psnr"] > 100


def load(rows: Sequence[Row]) -> str:
    """One line per server."""
    found = of(rows, "load")
    if not found:
        return ""
    slowest = min(r["requests_per_second"] for r in found)
    lines = [
        (
            name_of(r),
            "exact" if is_exact(r) else f"{r['psnr']:.1f}",
            f"{r['requests_per_second']:.1f}",
            f"{r['requests_per_second'] / slowest:.2f}",
            f"{r['p50']:.2f}",
            f"{r['p95']:.2f}",
        )
        for r in found
    ]
    return markdown(("server", "PSNR, dB", "requests/s", "×", "p50, s", "p95, s"), lines)


def soak(rows: Sequence[Row]) -> str:
    """What became of the requests of a soak."""
    lines = [
        (
            f"{r['minutes']:g}",
            r["arrived"],
            r["served"],
            r.get("gone", 0),
            r.get("raised", 0),
            r["crossed"],
            r["lost"],
            f"{r['worst']:.0e}",
            f"{100 * r['growth']:+.1f} %",
        )
        for r in of(rows, "load soak")
    ]
    columns = (
        "minutes", "requests", "served", "given up", "calls that raised", "crossed", "lost",
        "largest difference", "memory",
    )  # fmt: skip
    return markdown(columns, lines) if lines else ""


def load_figure(rows: Sequence[Row]) -> Figure:
    """Requests per second against quality, and beside it how long a request takes, median and 95th percentile."""
    names = [name_of(r) for r in rows]
    figure, (axes,) = new(1, 2, 12.5, 1.6 + 0.36 * len(rows))
    quality, latency = axes
    known = [r["psnr"] for r in rows if not is_exact(r)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    top = high + 0.25 * max(high - low, 4.0)  # where exact pictures stand, which have no PSNR
    tones = [colour(r["server"].split(",")[0]) for r in rows]
    widest, placed = max(max(r["rates"]) for r in rows), list[tuple[float, float]]()
    for number, (r, tone) in enumerate(zip(rows, tones, strict=True), 1):
        x, y = r["requests_per_second"], top if is_exact(r) else r["psnr"]
        marker = MARKERS.get(r["server"].rsplit(", ", 1)[-1], "s" if r["most"] > 1 else "o")
        quality.hlines(y, min(r["rates"]), max(r["rates"]), color=tone, lw=1.2, alpha=0.5)
        quality.plot(x, y, marker, color=tone, ms=13 if marker == "*" else 8)
        close = sum(abs(x - a) < widest / 12 and abs(y - b) < 0.5 for a, b in placed)
        placed.append((x, y))
        quality.annotate(
            str(number),
            (x, y),
            BESIDE[min(close, len(BESIDE) - 1)],
            textcoords="offset points",
            ha="center",
            color=INK,
        )
        latency.plot([r["p50"], r["p95"]], [number] * 2, color=tone, lw=3, solid_capstyle="round")
        latency.plot(r["p50"], number, marker, color=tone, ms=11 if marker == "*" else 7)
        latency.text(
            r["p95"], number, f"  {r['p50']:.2f} to {r['p95']:.2f} s", va="center", color=INK
        )
    quality.axhline(top, color=GREY, lw=0.8, ls=":")
    ticks = [t for t in quality.get_yticks() if low - 2 <= t < top - 1]
    quality.set_yticks([*ticks, top], [*(f"{t:g}" for t in ticks), "exact"])
    quality.set_ylim(low - 0.1 * (top - low), top + 0.1 * (top - low))
    quality.set_xlim(0, 1.05 * widest)
    quality.set_xlabel("requests per second, overloaded (line: its rounds)")
    quality.set_ylabel("PSNR against the uncached pictures, dB")
    quality.grid(alpha=0.25)
    latency.set_yticks(range(1, len(rows) + 1), [f"{name}  {i}" for i, name in enumerate(names, 1)])
    latency.invert_yaxis()
    latency.set_xlim(0, 1.35 * max(r["p95"] for r in rows))
    latency.set_xlabel("seconds from arrival to picture, median to 95th percentile")
    return figure
