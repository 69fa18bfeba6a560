# SPDX-License-Identifier: Apache-2.0
"""Many requests on one model for a long time: resident memory and the cache's bytes stay flat.

    python -m bench soak --steps 10000 --json out.jsonl

Every method in turn serves requests that start at random moments, go through their steps interleaved, are
sometimes given up half way, and are never reset. Memory is read from the kernel fifty times per
method; the claim compares the last quarter with the second one, warm-up left out.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastcache

from . import common
from .common import Row

RUN, OPEN, BUDGET = 20, 6, 2**20  # steps of a request, requests at a time, bytes
GROWTH = 0.01


def configs() -> dict[str, Any]:
    return {
        "FirstBlockCache": fastcache.FirstBlockCacheConfig(threshold=0.15),
        "MagCache": fastcache.MagCacheConfig(
            num_inference_steps=RUN, mag_ratios=[1.0] + [0.98] * (RUN - 1)
        ),
        "TaylorSeer": fastcache.TaylorSeerCacheConfig(cache_interval=4),
        "PAB": fastcache.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: None
        ),
        "Guided": fastcache.preset("quality"),
    }


@dataclass
class Request:
    number: int
    tokens: Tensor
    at: int = 0


def serve(model: nn.Module, cache: fastcache.Cache, steps: int, seed: int) -> Iterator[int]:
    """Denoiser calls of interleaved requests; yields the cache's bytes after each."""
    from fastcache.demo.model import denoise
    from fastcache.demo.sample import initial_noise, sigmas

    dice, levels, running, born = random.Random(seed), sigmas(RUN), [], 0
    for _ in range(steps):
        if len(running) < OPEN and (not running or dice.random() < 0.3):
            running.append(Request(born, initial_noise(1, seed=born % 16)))
            born += 1
        one = dice.choice(running)
        label = torch.tensor([one.number % 10])
        with cache.context(
            "cond",
            request=one.number,
            step_index=one.at,
            num_inference_steps=RUN,
            timestep=1000 * levels[one.at],
        ):
            velocity = denoise(model, one.tokens, torch.tensor([levels[one.at]]), label)
        one.tokens = one.tokens + (levels[one.at + 1] - levels[one.at]) * velocity
        one.at += 1
        if one.at == RUN or dice.random() < 0.002:  # done, or the client has gone
            running.remove(one)
        yield cache.nbytes()


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@torch.no_grad()
def soak(name: str, config: Any, steps: int, count: int, tick: Any) -> Row:
    from fastcache.demo.model import load_model

    model, every = load_model(), max(1, steps // count)
    readings, most = [], 0
    with fastcache.enable(model, config, max_bytes=BUDGET) as cache:
        for i, held in enumerate(serve(model, cache, steps, seed=0), 1):
            most = max(most, held)
            if i % every == 0:
                gc.collect()
                readings.append(resident())
                tick(every)
        reused = cache.stats.reused
    quarter = max(1, len(readings) // 4)
    before, after = (
        statistics.median(readings[quarter : 2 * quarter]),
        statistics.median(readings[-quarter:]),
    )
    return {
        "bench": "soak",
        "method": name,
        "steps": steps,
        "resident_before": before,
        "resident_after": after,
        "growth": after / before - 1,
        "most_bytes": most,
        "max_bytes": BUDGET,
        "reused": reused,
        "readings": readings,
    }


def main(argv: list[str] | None = None) -> int:
    p = common.parser("soak", __doc__)
    p.add_argument("--steps", type=int, help="denoiser calls in all, over the methods")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    each = (args.steps or (250 if args.quick else 10_000)) // len(configs())
    with common.bar(each * len(configs()), "soak") as progress:
        rows = [
            soak(name, config, each, 5 if args.quick else 50, progress.update)
            | common.environment()
            for name, config in configs().items()
        ]
    table = [
        [
            r["method"],
            r["steps"],
            f"{r['resident_after'] / 2**20:.0f}",
            f"{r['growth']:+.2%}",
            f"{r['most_bytes'] / 2**20:.2f}",
            r["reused"],
        ]
        for r in rows
    ]
    columns = ["method", "calls", "resident MiB", "growth", "most held MiB", "reused"]
    common.print_table(
        f"{OPEN} requests at a time, max_bytes {BUDGET / 2**20:g} MiB", columns, table
    )
    if args.json:
        common.write_lines(args.json, rows)
    bad = [r["method"] for r in rows if r["most_bytes"] > BUDGET]
    if not args.quick:
        bad += [r["method"] for r in rows if r["growth"] > GROWTH]
    print(f"memory grew or passed its budget: {', '.join(bad)}" if bad else "flat, within budget")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
