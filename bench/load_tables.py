# SPDX-License-Identifier: Apache-2.0
"""Tables of what servers do under load."""

from __future__ import annotations

from collections.abc import Sequence

from .common import Row
from .tables import markdown, of


def load(rows: Sequence[Row]) -> str:
    """One line per server."""
    found = of(rows, "load")
    if not found:
        return ""
    slowest = min(r["requests_per_second"] for r in found)
    lines = [
        (
            f"{r['server']}, {r['setting']}",
            "exact" if r["psnr"] is None or r["psnr"] > 100 else f"{r['psnr']:.1f}",
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
