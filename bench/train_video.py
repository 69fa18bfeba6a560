# SPDX-License-Identifier: Apache-2.0
"""Train the video model of the quality benchmark; deterministic for a given torch build.

    python -m bench.train_video

Writes the fp16 checkpoint and a record (recipe, held-out loss, sample accuracy, versions) into
bench/assets, and with --picture some samples. It takes about 15 minutes of one CPU core.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fastcache.demo.data import Digits, load_digits
from fastcache.demo.loss_curve import History
from fastcache.demo.model import load_judge, save_weights
from fastcache.demo.sample import GUIDANCE
from fastcache.demo.train import (
    EVAL_SEED,
    Recipe,
    Task,
    check_fall,
    held_out_loss,
    train_denoiser,
    versions,
)

from . import video

RECIPE = Recipe(steps=2800, batch=16)
VIDEOS = Task(
    video.build_model,
    video.denoise,
    lambda images, generator: video.pack(video.animate(images, generator)),
)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.train_video", description=__doc__)
    p.add_argument("--steps", type=int, default=RECIPE.steps)
    p.add_argument("--batch", type=int, default=RECIPE.batch)
    p.add_argument("--out", type=Path, default=video.ASSETS)
    p.add_argument("--threads", type=int, default=1, help="part of what makes runs equal")
    p.add_argument("--samples", type=int, default=100, help="videos for sample accuracy")
    p.add_argument("--picture", type=Path, help="write a contact sheet of samples to this file")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=args.steps, batch=args.batch)
    train, held_out = load_digits()

    start = time.perf_counter()
    model, history = train_denoiser(recipe, train, held_out, VIDEOS)
    seconds = round(time.perf_counter() - start)
    save_weights(model, args.out / video.MODEL_FILE)
    record = _record(recipe, history, args.out, held_out, args.samples)
    record |= {"training_seconds": seconds, "threads": args.threads}
    (args.out / video.RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    if args.picture:
        contact_sheet(args.out, held_out, args.picture)
    return check_fall(history)


def _record(
    recipe: Recipe, history: History, out: Path, held_out: Digits, samples: int
) -> dict[str, object]:
    """Measured on the file that was written, not on the weights in memory."""
    model, judge = video.load_model(out / video.MODEL_FILE), load_judge()
    labels = torch.arange(samples) % 10
    quality = {}
    for name, guidance in (("unguided", None), ("guided", GUIDANCE)):
        videos = video.generate(model, labels, seed=EVAL_SEED, guidance=guidance)
        found = round(video.accuracy(judge, videos, labels), 4)
        quality[name] = {"guidance": guidance, "samples": samples, "frame_accuracy": found}
    real = video.animate(held_out.images, torch.Generator().manual_seed(EVAL_SEED))
    window = max(1, len(history.train) // 20)
    means = torch.tensor(history.train).unfold(0, window, window).mean(1)
    return {
        "format": "fastcache-video-training",
        "architecture": video.ARCHITECTURE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "held_out_loss": held_out_loss(model, held_out, task=VIDEOS),
        "real_frame_accuracy": video.accuracy(judge, real, held_out.labels),
        "samples": quality,
        "versions": versions(),
        "history": {
            f"train, means of {window}": [round(x, 4) for x in means.tolist()],
            "held_out": [[step, round(loss, 4)] for step, loss in history.held_out],
        },
    }


def contact_sheet(out: Path, held_out: Digits, path: Path) -> None:
    """Ten real videos, ten samples and ten guided ones, a frame a column."""
    from .figures import new, save

    labels = torch.arange(10)
    first = torch.stack([(held_out.labels == d).nonzero()[0, 0] for d in labels])
    model = video.load_model(out / video.MODEL_FILE)
    sheets = {
        "real": video.animate(held_out.images[first], torch.Generator().manual_seed(0)),
        "samples": video.generate(model, labels),
        f"guidance {GUIDANCE:g}": video.generate(model, labels, guidance=GUIDANCE),
    }
    figure, axes = new(1, len(sheets), 9.0, 5.6)
    for axis, (title, videos) in zip(axes[0], sheets.items(), strict=True):
        axis.imshow(_tiled(videos).numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    save(figure, path)


def _tiled(videos: Tensor) -> Tensor:
    """[B, F, 1, H, W] -> [B * H, F * W]."""
    return videos[:, :, 0].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


if __name__ == "__main__":
    raise SystemExit(main())
