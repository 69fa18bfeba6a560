# SPDX-License-Identifier: Apache-2.0
"""Promises about speed and quality on trained models."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

from .cells import cells, frontier
from .claim import Claim, at_least
from .common import Row
from .sweeps import ABLATED, AFTER_THREE, INTERVALS, RIDGE

# Guided prediction over Taylor 1: by steps of a run, the intervals and dB that are promised
GUIDED_GAINS = {28: ((3, 4, 5), 2.0), 50: ((5, 7), 3.0)}


PROMISED_STEPS = (28, 50)  # of the shipped model in fp32


def quality(rows: Sequence[Row]) -> Iterator[Claim]:
    for cell, here in cells(rows):
        if (cell.model, cell.dtype) != ("flux", "fp32") or cell.steps not in PROMISED_STEPS:
            continue  # measured and shown, and nothing was promised
        if cell.guidance != "batched":  # swept for the guidance half alone
            yield from _frontier(here, cell.title)
        if cell.guidance == "none":
            yield from _guided(here, cell.steps, cell.title)
            yield from _forecasts(here, cell.title)
        yield from _seer(here, cell.title)
        yield from _broadcast(here, cell.title)


def _pick(rows: Sequence[Row], *key: str) -> Row | None:
    """The measured row of this key."""
    names = ("system", "method", "predictor", "setting")
    found = (r for r in rows if tuple(r[k] for k in names) == key)
    return next((r for r in found if r.get("psnr") is not None), None)


def _forecasts(rows: Sequence[Row], where: str) -> Iterator[Claim]:
    """Order 1 against reuse where both computed the same, and against fewer steps."""
    fewer = [r for r in rows if r["method"] == "fewer steps"]
    for method in ("FirstBlock", "MagCache"):
        gains = []
        for row in rows:
            key = (row["system"], row["method"], row["predictor"])
            if key != ("fastcache", method, "reuse") or row.get("psnr") is None:
                continue
            other = _pick(rows, "fastcache", method, "order 1", row["setting"])
            if other is None or abs(other["compute"] - row["compute"]) > 0.02:
                continue
            ahead = above_fewer(other, fewer)
            if ahead is not None and ahead > 0:
                gains.append((other["psnr"] - row["psnr"], row["setting"]))
        gains.sort(reverse=True)
        if len(gains) > 1:
            best = ", ".join(f"{g:.1f} dB at {s}" for g, s in gains[:2])
            text = f"{method}: order 1 over reuse on the same decisions, second best, {where}"
            value = gains[1][0]
            yield Claim("quality", text, best, "at least 5 dB at two", value >= 5)


def above_fewer(row: Row, fewer: Sequence[Row]) -> float | None:
    """dB above the uncached model at fewer steps and the same compute, interpolated."""
    points = sorted((r["compute"], r["psnr"]) for r in fewer if r.get("psnr") is not None)
    for (c0, p0), (c1, p1) in itertools.pairwise(points):
        if c0 <= row["compute"] <= c1:
            return row["psnr"] - (p0 + (p1 - p0) * (row["compute"] - c0) / (c1 - c0))
    return None


def _guided(rows: Sequence[Row], n: int, where: str) -> Iterator[Claim]:
    """Guided prediction against Taylor 1 on the same schedules, and what thinning the guide costs."""

    def psnr(method: str, predictor: str, setting: str) -> float | None:
        row = _pick(rows, "fastcache", method, predictor, setting)
        return row["psnr"] if row else None

    def gains(guide: str, intervals: Sequence[int], schedule: str, more: str = "") -> list[float]:
        pairs = [
            (
                psnr("Guided", f"{guide} guide", f"every {i}{schedule}{more}"),
                psnr("Interval", "order 1", f"every {i}{schedule}"),
            )
            for i in intervals
        ]
        return [ours - taylor for ours, taylor in pairs if ours is not None and taylor is not None]

    intervals, bound = GUIDED_GAINS.get(n, ((), 0.0))
    names = ", ".join(map(str, intervals))
    for schedule, first in ((AFTER_THREE, 3), ("", 4)):
        found = gains("residual", intervals, schedule)
        if found and len(found) == len(intervals):
            text = (
                f"residual guide, order 2, over Taylor 1 at the same computed steps, {first} first, then every "
                f"{names}, {where}"
            )
            shown = ", ".join(f"{g:.1f}" for g in found) + " dB"
            yield Claim("guided", text, shown, f"each at least {bound:g} dB", min(found) >= bound)
        for more in ("", f", ridge {RIDGE:g}"):
            found = gains("modulated", INTERVALS, schedule, more)
            if found:
                over = f"modulated guide{more}, over Taylor 1 at equal compute, {first} first steps"
                text = f"{over}, median of {len(found)} intervals, {where}"
                yield at_least("guided", text, statistics.median(found), 1, " dB")
                text = f"{over}, lowest of {len(found)} intervals, {where}"
                yield at_least("guided", text, min(found), -0.5, " dB")
    costs = [
        whole - thin
        for i in ABLATED
        for guide in ("residual guide", "modulated guide")
        if (whole := psnr("Guided", guide, f"every {i}, all tokens")) is not None
        if (thin := psnr("Guided", guide, f"every {i}")) is not None
    ]
    if costs:
        text = f"largest cost of keeping every 4th token of the guide, {len(costs)} cells, {where}"
        yield Claim("guided", text, f"{max(costs):.2f} dB", "at most 0.6 dB", max(costs) <= 0.6)
    guided = _pick(rows, "fastcache", "Guided", "modulated guide", "every 3")
    taylor = _pick(rows, "fastcache", "Interval", "order 2", "every 3")
    if guided and taylor:
        share = guided["cache_bytes"] / taylor["cache_bytes"] - 1
        text = f"bytes of the guides, against those of the residuals, {where}"
        # a handful of weights comes on top
        yield Claim("guided", text, f"{share:.3f}×", "at most 0.25×", share <= 0.255)


def _seer(rows: Sequence[Row], where: str) -> Iterator[Claim]:
    """Forecasts of the whole stack against upstream's forecast of the last projection's output."""
    lite = _pick(rows, "diffusers", "TaylorSeer", "order 1", "lite, every 4")
    taylor = _pick(rows, "fastcache", "TaylorSeer", "order 1", "stack, every 4")
    guided = _pick(rows, "fastcache", "TaylorSeer", "modulated guide", "stack, every 4")
    if lite and taylor:
        text = f"Taylor 1 on the stack over upstream's lite mode, every 4, same computed steps, {where}"
        lead = taylor["psnr"] - lite["psnr"]
        found = f"{lead:.2f} dB"
        if guided:
            found += f" (guided: {guided['psnr'] - lite['psnr']:.2f} dB)"
        yield Claim("quality", text, found, "at least 0.5 dB", lead >= 0.5)
    early = _pick(rows, "fastcache", "Interval", "order 1", "every 4, early start")
    if lite and early and abs(early["compute"] - lite["compute"]) < 1e-3:
        text = f"Taylor 1 on the stack over upstream's lite mode, every 4, as many computed steps, {where}"
        yield at_least("quality", text, early["psnr"] - lite["psnr"], 0.5, " dB")


def _broadcast(rows: Sequence[Row], where: str) -> Iterator[Claim]:
    if not rows or rows[0]["guidance"] != "sequential":
        return
    ours = _pick(rows, "fastcache", "PAB", "reuse", "range 2")
    theirs = _pick(rows, "diffusers", "PAB", "reuse", "range 2")
    if ours and theirs:
        text = f"PAB over upstream's, range 2, {where}"
        yield at_least("quality", text, ours["psnr"] - theirs["psnr"], 15, " dB")


def _frontier(rows: Sequence[Row], where: str) -> Iterator[Claim]:
    """The smallest lead over all compute budgets at which both sides have a point."""
    lines = frontier(rows)
    for other, bound, name in (
        ("diffusers", 1, "the best of diffusers' methods"),
        ("cache-dit", 1, "the best of cache-dit"),
        ("reuse", 4, "the best of our rules with plain reuse"),
        ("uncached", 3, "fewer steps"),
    ):
        leads = [
            (line["fastcache"] - line[other], line["budget"])
            for line in lines
            if line["fastcache"] is not None and line[other] is not None
        ]
        if leads:
            lead, budget = min(leads)
            text = f"best recipe over {name}, the smallest lead of 25 to 60 % compute, {where}"
            found = f"{lead:.1f} dB at {budget:.0%}"
            yield Claim("frontier", text, found, f"at least {bound} dB", lead >= bound)
