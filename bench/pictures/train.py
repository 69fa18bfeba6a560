# SPDX-License-Identifier: Apache-2.0
"""Train the picture model; resumable, and deterministic for a given torch build and number of threads.

    npm pack emoji-datasource-google@16.0.0
    python -m bench.pictures.train --data emoji-datasource-google-16.0.0.tgz --size 7M --minutes 120

Every few minutes the state, the loss curve and a sheet of samples are written into --out; the same command
goes on from there. With --export the average is written as fp16 weights, with its card, into bench/assets;
with --minutes 0 nothing else is done. --json bench/results/training-cpu.jsonl keeps the loss curve for the report.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from fastcache.demo.loss_curve import CURVE_FILE, plot_history
from fastcache.demo.train import check_fall

from .data import PACKAGE, VERSION, load_pictures
from .model import ASSETS, HEADS, architecture, file_of
from .record import card, export, keep_row
from .sheet import write_sheet
from .training import Recipe, Trainer, Training

STATE_FILE = "state.pt"
EVERY = 250  # steps between held-out losses


def main(argv: list[str] | None = None) -> int:
    args = parser("train", __doc__, "build/pictures").parse_args(argv)
    torch.set_num_threads(args.threads)
    # autocast leaves the weights of norms in fp32, which takes the slower way
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    out = args.out / args.size
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = load_pictures(args.data)
    recipe = Recipe(seed=args.seed, autocast=not args.fp32)
    trainer = Trainer(architecture(HEADS[args.size]), recipe, train, args.device)
    if (out / STATE_FILE).exists():
        trainer.resume(out / STATE_FILE)
    run(trainer, held_out, out, args.steps, args.minutes, args.save_minutes)
    if args.export:
        found = export(trainer, card(trainer, held_out), args.export / file_of(args.size))
        if args.json:
            keep_row(args.json, "training", args.size, found)
    return check_fall(trainer.history)


def run(
    trainer: Training, held_out: Any, out: Path, steps: int, minutes: float, between: float
) -> None:
    """Train up to `steps` in all or for `minutes`, whichever ends first; save every `between` minutes."""
    from tqdm import tqdm

    start = saved = time.monotonic()
    before = trainer.steps
    bar = tqdm(total=steps, initial=trainer.steps, desc="pictures", unit="step", mininterval=5)
    while trainer.steps < steps and time.monotonic() - start < 60 * minutes:
        trainer.step()
        bar.update()
        if trainer.steps % EVERY == 0:
            trainer.history.held_out.append((trainer.steps, trainer.held_out_loss(held_out)))
            recent = sum(trainer.history.train[-EVERY:]) / EVERY
            bar.set_postfix(
                train=f"{recent:.3f}", held_out=f"{trainer.history.held_out[-1][1]:.3f}"
            )
        if time.monotonic() - saved > 60 * between:
            keep(trainer, out)
            saved = time.monotonic()
    bar.close()
    if trainer.steps > before:
        keep(trainer, out)


def keep(trainer: Training, out: Path) -> None:
    """Write the state, and what there is to look at."""
    trainer.save(out / STATE_FILE)
    plot_history(trainer.history, out / CURVE_FILE)
    average = copy.deepcopy(trainer.average).eval().cpu()
    write_sheet(average, out / f"samples-{trainer.steps // 1000}k.png", **trainer.sampled)


def parser(name: str, doc: str | None, out: str) -> argparse.ArgumentParser:
    """The options that all trainings share."""
    p = argparse.ArgumentParser(
        prog=f"python -m bench.pictures.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", type=Path, required=True, help=f"archive of {PACKAGE} {VERSION}")
    p.add_argument("--size", choices=list(HEADS), default="7M")
    p.add_argument("--out", type=Path, default=Path(out), help="a folder per size in it")
    p.add_argument("--steps", type=int, default=20_000, help="stop after as many in all")
    p.add_argument("--minutes", type=float, default=1e9, help="stop after as many in this call")
    p.add_argument("--save-minutes", type=float, default=4)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--fp32", action="store_true", help="no bf16 matrices")
    p.add_argument("--threads", type=int, default=2, help="part of what makes runs equal")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--export", type=Path, nargs="?", const=ASSETS, help="write fp16 weights here")
    p.add_argument("--json", type=Path, help="with --export: put the loss curve into these results")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
