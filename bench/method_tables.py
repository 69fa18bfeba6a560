# SPDX-License-Identifier: Apache-2.0
"""Tables and promises of the methods that people know by name, from rows of `bench quality --named`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

from .cells import cells
from .claim import Claim, at_least
from .common import Row
from .subjects import NAMES
from .tables import digits, markdown, of

SHARES = (0.3, 0.4, 0.5, 0.6)  # of the uncached run's compute
BETTER = 3.0  # dB that order 1 is to bring over reuse under the same signal
SIGNALS = (
    "TeaCache, plain",
    "TeaCache, published",
    "TeaCache, fitted",
    "EasyCache",
    "SeaCache",
    "SenCache",
)


def name_of(row: Row) -> str:
    """What a row's curve is called: the method, and what of its setting is no strength."""
    method, setting = row["method"], row["setting"]
    kind = setting.rpartition(", ")[2] if ", " in setting else ""
    return f"{method}, {kind}" if kind else method


def curves(rows: Sequence[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(compute, PSNR) of every method and predictor, ascending."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("psnr") is not None:
            key = name_of(row), row["predictor"]
            found.setdefault(key, []).append((row["compute"], row["psnr"]))
    return {key: sorted(points) for key, points in found.items()}


def at(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """PSNR at a share of the compute, between two measured ones; None beyond them."""
    for (c0, p0), (c1, p1) in itertools.pairwise(points):
        if c0 <= share <= c1 and c1 > c0:
            return p0 + (p1 - p0) * (share - c0) / (c1 - c0)
    return None


def methods(rows: Sequence[Row]) -> str:
    """PSNR of every method at equal compute, a group of columns per model."""
    models = {cell.model: curves(here) for cell, here in cells(of(rows, "methods"))}
    keys = dict.fromkeys(key for found in models.values() for key in found)
    lines = []
    for method, predictor in keys:
        points = [found.get((method, predictor), []) for found in models.values()]
        values = [at(each, share) for each in points for share in SHARES]
        if any(v is not None for v in values):
            lines.append((method, predictor, *(digits(v) for v in values)))
    columns = [f"{model} {share:.0%}" for model in models for share in SHARES]
    return markdown(("method", "with", *columns), lines) if lines else ""


def leads(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[float]]]:
    """Model, method, and dB of each order-1 setting over the same signal with reuse, at equal compute."""
    for cell, here in cells(of(rows, "methods")):
        found = curves(here)
        for (method, predictor), points in found.items():
            reuse = found.get((method, "reuse"))
            if predictor != "order 1" or reuse is None:
                continue
            ahead = [p - other for c, p in points if (other := at(reuse, c)) is not None]
            if ahead:
                yield cell.model, method, ahead


def method_leads(rows: Sequence[Row]) -> str:
    """What order 1 brings over reuse under the same rule."""
    found: dict[str, dict[str, list[float]]] = {}
    for model, method, ahead in leads(rows):
        found.setdefault(method, {})[model] = ahead
    models = list(dict.fromkeys(model for line in found.values() for model in line))
    lines = []
    for method, line in found.items():
        shown = []
        for model in models:
            ahead = line.get(model)
            shown.append(
                f"{statistics.median(ahead):+.1f} ({min(ahead):+.1f} to {max(ahead):+.1f})"
                if ahead
                else ""
            )
        lines.append((method, *shown))
    return markdown(("method", *(NAMES[m] for m in models)), lines) if lines else ""


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Order 1 over reuse under each signal that is measured before any block has run."""
    for model, method, ahead in leads(rows):
        if method in SIGNALS:
            text = f"{method}: order 1 over reuse, same signal, equal compute, median of {len(ahead)} settings, {model}"
            yield at_least("methods", text, statistics.median(ahead), BETTER, " dB")
