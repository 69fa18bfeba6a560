# SPDX-License-Identifier: Apache-2.0
"""Tables of a distilled model: each system's best at the cost of fewer steps, and what tune says."""

from __future__ import annotations

from collections.abc import Sequence

from .cells import best
from .common import Row
from .few_steps import FORECASTS
from .tables import digits, markdown, of

MODEL = "pictures-student"
MASKS = {"mask/8": (8, "Hermite 1", "0 1 2 3 5 7"), "mask/4": (4, "Hermite 1", "0 1 3")}  # presets
PEERS = {"diffusers": "diffusers' hooks", "cache-dit": "cache-dit"}
COUNTS = (8, 4)  # steps of a run
SLACK = 0.007  # of the uncached run's compute, which reused steps may take


def few_steps(rows: Sequence[Row]) -> str:
    """By computed steps: fewer steps, our best schedule, that with each predictor, and each peer's best."""
    lines = []
    for steps in COUNTS:
        here = of(rows, "quality", model=MODEL, steps=steps)
        lines += [_line(here, steps, n) for n in reversed(range(steps // 2, steps)) if here]
    columns = ("steps", "computed", "fewer steps", "best of ours", *FORECASTS, *PEERS.values())
    return markdown((*columns, "the best"), lines) if lines else ""


def _line(here: Sequence[Row], steps: int, computed: int) -> tuple[object, ...]:
    def found(**fields: str) -> Row | None:
        rows = [r for r in here if all(r[k] == v for k, v in fields.items())]
        return best(rows, computed / steps + SLACK)

    mine = found(system="fastcache")
    cells = [found(system="uncached"), mine]
    cells += [found(system="fastcache", predictor=name) for name in FORECASTS]
    cells += [found(system=system) for system in PEERS]
    name = f"{mine['predictor']} at {mine['setting']}" if mine else ""
    return steps, computed, *(digits(r and r["psnr"]) for r in cells), name


def preset(rows: Sequence[Row]) -> str:
    """The presets for so few steps beside fewer steps of their cost."""
    lines = []
    for name, (steps, predictor, setting) in MASKS.items():
        here = of(rows, "quality", model=MODEL, steps=steps)
        computed = len(setting.split())
        mine = [r for r in here if (r["predictor"], r["setting"]) == (predictor, setting)]
        fewer = [r for r in here if r["setting"] == f"{computed} steps"]
        if mine and fewer:
            psnr, other = mine[0]["psnr"], fewer[0]["psnr"]
            lines.append((f'`preset("{name}")`', setting, digits(psnr), digits(other)))
    columns = ("", "computed", "PSNR", "as many steps without a cache")
    return markdown(columns, lines) if lines else ""


def said(rows: Sequence[Row]) -> str:
    """What tune was asked on the distilled model, and its words."""
    lines = [
        (r["steps"], f"{r['speedup']:g}", r["said"])
        for r in of(rows, "tune", part="few", model=MODEL)
    ]
    return markdown(("steps", "times as fast", "tune says"), lines) if lines else ""
