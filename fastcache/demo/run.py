# SPDX-License-Identifier: Apache-2.0
"""The demo: one trained model, the same noise, one row per method.

    fastcache demo --out demo_out --json demo_out/demo.json

Every method is compared with the uncached run *and* with the uncached model at fewer steps, which
is what one would do without a cache.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import require
from .metrics import accuracy, psnr, relative_l2, ssim
from .model import load_judge, load_model
from .nearer import nearer
from .rows import Row, Run, Settings, reference_of
from .sample import generate
from .table import print_table

if TYPE_CHECKING:
    from tqdm import tqdm

    from .model import Judge


PICTURE_FILE = "demo.png"


# uncached step counts, as shares of the full run, that the equal-compute curve goes through
CURVE = (5 / 28, 7 / 28, 9 / 28, 14 / 28, 21 / 28)


CALIBRATION_SEED = 1234


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the picture; returns the exit status."""
    require("diffusers", "safetensors", "matplotlib", "rich", "tqdm")
    args = _parser().parse_args(argv)
    settings = Settings(args.steps, args.batch, args.seed, args.rounds, args.budget)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model, judge = load_model(), load_judge()
    labels = torch.arange(settings.batch) % 10
    runs, curves = measure(model, labels, settings)
    rows = summarise(runs, curves, judge, labels)
    print_table(rows, settings)
    gain = nearer(model, settings.steps, settings.seed)
    print(gain)

    from .picture import draw

    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / PICTURE_FILE
    draw(runs, rows, curves[None], picture)
    print(f"picture: {picture}")
    if args.json is not None:
        seconds = time.perf_counter() - start
        record = _record(rows, curves, settings, len(runs[0].seconds), seconds)
        record["nearer"] = vars(gain)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")
        print(f"numbers: {args.json}")
    return 0


# PSNR of the uncached model by number of steps, per guidance scale
Curves = dict[float | None, dict[int, float]]


def measure(model: nn.Module, labels: Tensor, settings: Settings) -> tuple[list[Run], Curves]:
    """All methods, interleaved, then the uncached model at fewer steps."""
    from tqdm import tqdm

    from .methods import methods

    runs = [Run(row) for row in methods(settings.steps, calibrate(model, settings.steps))]
    round_work = sum(run.method.steps or settings.steps for run in runs)
    start = time.perf_counter()
    with tqdm(total=round_work * settings.rounds, unit="step", desc="demo", mininterval=0.5) as bar:
        for index in range(settings.rounds):
            # leave out a round that would not fit, taking it to be as long as the earlier ones
            if index and (time.perf_counter() - start) * (index + 1) / index > settings.budget:
                bar.total = round_work * index
                break
            for run in runs:
                bar.set_postfix_str(f"round {index + 1}/{settings.rounds}: {run.method.name}")
                _generate(model, run, labels, settings, bar)
    return runs, fewer_steps(model, runs, labels, settings)


def fewer_steps(model: nn.Module, runs: list[Run], labels: Tensor, settings: Settings) -> Curves:
    """What the uncached model gives at fewer steps, for every guidance scale among `runs`."""
    from tqdm import tqdm

    counts = sorted({round(share * settings.steps) for share in CURVE} - {0})
    curves: Curves = {None: {}}  # guided rows are compared with their own uncached run alone
    work = [(guidance, steps) for guidance in curves for steps in counts]
    for guidance, steps in tqdm(work, unit="run", desc="fewer steps"):
        images = generate(model, labels, steps=steps, seed=settings.seed, guidance=guidance)
        full = next(r for r in runs if r.method.guidance == guidance and r.method.is_reference)
        curves[guidance][steps] = psnr(images, full.images)
    return curves


def calibrate(
    model: nn.Module, steps: int, sample: Callable[..., Tensor] = generate
) -> list[float]:
    """MagCache's magnitude ratios of this model at `steps` steps."""
    import fastcache

    labels = torch.arange(10)
    calibration = fastcache.calibrate(
        lambda cache: sample(model, labels, steps=steps, seed=CALIBRATION_SEED, cache=cache),
        model,
        num_inference_steps=steps,
    )
    return list(calibration.mag_ratios)


def summarise(runs: list[Run], curves: Curves, judge: Judge, labels: Tensor) -> list[Row]:
    """One row per run, each against the uncached run with the same guidance."""
    rows = []
    for run in runs:
        reference = reference_of(run, runs)
        compute = sum(run.blocks) / sum(reference.blocks)
        quality = psnr(run.images, reference.images)
        seconds = statistics.median(run.seconds)
        row = Row(
            name=run.method.name,
            family=run.method.family,
            predictor=run.method.predictor,
            guidance=run.method.guidance,
            steps=len(run.blocks),
            computed_steps=run.blocks.count(max(run.blocks)),
            blocks=run.blocks,
            compute=compute,
            seconds=seconds,
            speedup=statistics.median(reference.seconds) / seconds,
            psnr=None if math.isinf(quality) else quality,
            relative_l2=relative_l2(run.images, reference.images),
            ssim=ssim(run.images, reference.images),
            accuracy=accuracy(judge, run.images, labels),
            fewer_steps_psnr=None
            if run.method.config is None or run.method.guidance not in curves
            else interpolate(curves[run.method.guidance], compute * len(reference.blocks)),
        )
        rows.append(row)
    return rows


def interpolate(curve: dict[int, float], steps: float) -> float | None:
    """PSNR at a fractional number of uncached steps, linear between points, None outside."""
    points = sorted(curve.items())
    for (n0, p0), (n1, p1) in pairwise(points):
        if n0 <= steps <= n1:
            return p0 + (p1 - p0) * (steps - n0) / (n1 - n0)
    return None


def _generate(model: nn.Module, run: Run, labels: Tensor, settings: Settings, bar: tqdm) -> None:
    """One generation of `run.method`: appends its time; images and block counts must repeat."""
    import fastcache

    method, blocks = run.method, []
    cached = method.config is not None
    with (
        _block_calls(model) as calls,
        fastcache.enable(model, method.config) if cached else nullcontext() as cache,
    ):

        def step_done(n: int) -> None:
            blocks.append(len(calls))
            calls.clear()
            bar.update(n)

        start = time.perf_counter()
        images = generate(
            model,
            labels,
            steps=method.steps or settings.steps,
            seed=settings.seed,
            guidance=method.guidance,
            batched_guidance=method.batched_guidance,
            cache=cache,
            progress=step_done,
        )
        run.seconds.append(time.perf_counter() - start)
    if len(run.seconds) > 1 and not torch.equal(run.images, images):
        raise RuntimeError(f"demo row {method.name!r}: two runs from the same noise differ")
    run.images, run.blocks = images, blocks


@contextmanager
def _block_calls(model: nn.Module) -> Iterator[list[None]]:
    """A list that grows by one item whenever a transformer block really runs."""
    calls: list[None] = []
    handles = [
        block.register_forward_hook(lambda *_: calls.append(None))
        for blocks in model.children()
        if isinstance(blocks, nn.ModuleList)
        for block in blocks
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _record(
    rows: list[Row], curves: Curves, settings: Settings, rounds: int, seconds: float
) -> dict[str, object]:
    return {
        "format": "fastcache-demo",
        "version": 1,
        "settings": vars(settings),
        "threads": torch.get_num_threads(),
        "rounds_run": rounds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "total_seconds": seconds,
        "fewer_steps_psnr": [
            {"guidance": guidance, "steps": steps, "psnr": value}
            for guidance, curve in curves.items()
            for steps, value in curve.items()
        ],
        "rows": [{**vars(row), "gain": row.gain} for row in rows],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastcache demo",
        description=__doc__.splitlines()[0],
        epilog="--model pictures, in a checkout: colour pictures from words instead, with guidance",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for pictures")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="uncached Euler steps")
    parser.add_argument(
        "--batch", "--seeds", type=int, default=Settings.batch, help="images, each with its noise"
    )
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed of the noise")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="timed rounds")
    parser.add_argument(
        "--budget",
        type=float,
        default=Settings.budget,
        help="seconds for the rounds; those that would not fit are left out",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; one is steady on a shared machine"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
