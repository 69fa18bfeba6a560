# SPDX-License-Identifier: Apache-2.0
"""What the guards of a policy are worth on the trained model: PSNR at equal compute.

    python -m bench guards --json guards.jsonl

Every guard costs computed steps, so settings are compared at the same number of them: each is swept
over thresholds, and its PSNR read off where it computes 10, 12 and 15 of 28 steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import fastcache
from fastcache import FirstBlock, Recipe, Reuse, Taylor
from fastcache.demo.metrics import psnr
from fastcache.demo.model import load_model
from fastcache.demo.run import interpolate
from fastcache.demo.sample import generate

from . import common

THRESHOLDS = (0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.36, 0.45, 0.6)
GUARDS = (
    {"warmup": 0, "last": False},
    {"warmup": 2, "last": False},
    {"warmup": 4, "last": False},
    {"warmup": 6, "last": False},
    {"warmup": 0, "last": True},
    {"warmup": 4, "last": True},
    {"warmup": 4, "last": True, "max_skips": 3},
    {"warmup": 4, "last": True, "max_skips": 5},
)
BUDGETS = (10, 12, 15)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    batch, thresholds = (2, THRESHOLDS[::3]) if args.quick else (args.batch, THRESHOLDS)
    model, labels = load_model(), torch.arange(batch) % 10
    reference = generate(model, labels)
    rows: list[common.Row] = []
    print(f"PSNR in dB at {BUDGETS} of 28 steps computed, {batch} images")
    for what in (Reuse(), Taylor(order=1)):
        for guards in GUARDS:
            curve = sweep(model, labels, reference, what, guards, thresholds)
            at = {n: interpolate(curve, n) for n in BUDGETS}
            cells = ["   - " if v is None else f"{v:5.1f}" for v in at.values()]
            print(f"{type(what).__name__:<8}{guards!s:<52}{'  '.join(cells)}", flush=True)
            rows.append(
                {"bench": "guards", "what": type(what).__name__, **guards, "psnr": at}
                | common.environment()
            )
    if args.json is not None:
        common.write_lines(args.json, rows)
    return 0


def sweep(
    model: torch.nn.Module,
    labels: torch.Tensor,
    reference: torch.Tensor,
    what: fastcache.Reuse | Taylor,
    guards: dict,
    thresholds: Sequence[float],
) -> dict[float, float]:
    """PSNR by number of computed steps; of equal numbers the better."""
    curve: dict[float, float] = {}
    for threshold in thresholds:
        when = FirstBlock(threshold, **{"max_skips": 0, **guards})
        with fastcache.enable(model, Recipe(when, what)) as cache:
            images = generate(model, labels, cache=cache)
            computed = cache.stats.computed
        curve[computed] = max(curve.get(computed, 0.0), psnr(images, reference))
    return curve


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench guards", description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few points only")
    parser.add_argument("--json", type=Path, help="write one line per row")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
