# SPDX-License-Identifier: Apache-2.0
"""What the trainings of the quality benchmark's digit models share: command line, card and contact sheet."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.demo.data import Digits, load_digits
from fastcache.demo.loss_curve import History
from fastcache.demo.model import Judge, load_judge, save_weights
from fastcache.demo.train import (
    EVAL_SEED,
    Recipe,
    Task,
    check_fall,
    held_out_loss,
    train_denoiser,
    versions,
)

from . import common
from .common import Row

LICENCES = {
    "licence": "Apache-2.0",
    "data": "scikit-learn's load_digits: BSD-3-Clause; digits: E. Alpaydin, C. Kaynak, UCI, CC BY 4.0",
}


@dataclass(frozen=True)
class Trainee:
    """One model that is trained on the digits, and how its samples are looked at."""

    name: str  # of its format
    task: Task
    recipe: Recipe
    architecture: dict[str, Any]
    folder: Path
    files: tuple[str, str]  # of the weights and of the card
    load: Callable[[Path], nn.Module]
    generate: Callable[..., Tensor]  # (model, labels, seed=, guidance=)
    guidance: float
    real: Callable[[Tensor, torch.Generator], Tensor]  # samples that images [B, 1, 16, 16] make
    judged: Callable[[Judge, Tensor, Tensor], Row]  # (judge, samples, labels)
    tiled: Callable[[Tensor], Tensor]  # samples as one picture [H, W]


def main(trainee: Trainee, about: str | None, argv: list[str] | None = None) -> int:
    """Train, write the weights and their card, measure what was written."""
    args = _parser(trainee, about).parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=args.steps, batch=args.batch)
    train, held_out = load_digits()

    start = time.perf_counter()
    model, history = train_denoiser(recipe, train, held_out, trainee.task)
    seconds = round(time.perf_counter() - start)
    weights, card = (args.out / file for file in trainee.files)
    save_weights(model, weights)
    record = _record(trainee, recipe, history, weights, held_out, args.samples)
    record |= {"training_seconds": seconds, "threads": args.threads}
    card.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    if args.picture:
        contact_sheet(trainee, weights, held_out, args.picture)
    return check_fall(history)


def _record(
    trainee: Trainee,
    recipe: Recipe,
    history: History,
    weights: Path,
    held_out: Digits,
    samples: int,
) -> Row:
    """Measured on the file that was written, not on the weights in memory."""
    model, judge = trainee.load(weights), load_judge()
    labels = torch.arange(samples) % 10
    quality = {}
    for name, guidance in (("unguided", None), ("guided", trainee.guidance)):
        found = trainee.generate(model, labels, seed=EVAL_SEED, guidance=guidance)
        head = {"guidance": guidance, "samples": samples}
        quality[name] = head | _rounded(trainee.judged(judge, found, labels))
    real = trainee.real(held_out.images, torch.Generator().manual_seed(EVAL_SEED))
    window = max(1, len(history.train) // 20)
    means = torch.tensor(history.train).unfold(0, window, window).mean(1)
    return {
        "format": f"fastcache-{trainee.name}-training",
        **LICENCES,
        "architecture": trainee.architecture,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "commit": common.commit(),
        "recipe": asdict(recipe),
        "held_out_loss": held_out_loss(model, held_out, task=trainee.task),
        **{f"real_{k}": v for k, v in trainee.judged(judge, real, held_out.labels).items()},
        "samples": quality,
        "versions": versions(),
        "history": {
            f"train, means of {window}": [round(x, 4) for x in means.tolist()],
            "held_out": [[step, round(loss, 4)] for step, loss in history.held_out],
        },
    }


def _rounded(row: Row) -> Row:
    return {k: round(v, 4) for k, v in row.items()}


def contact_sheet(trainee: Trainee, weights: Path, held_out: Digits, path: Path) -> None:
    """Ten real samples, ten of the model and ten guided ones."""
    from .figures import new, save

    labels = torch.arange(10)
    first = torch.stack([(held_out.labels == d).nonzero()[0, 0] for d in labels])
    model = trainee.load(weights)
    sheets = {
        "real": trainee.real(held_out.images[first], torch.Generator().manual_seed(0)),
        "samples": trainee.generate(model, labels),
        f"guidance {trainee.guidance:g}": trainee.generate(
            model, labels, guidance=trainee.guidance
        ),
    }
    figure, axes = new(1, len(sheets), 9.0, 5.6)
    for axis, (title, samples) in zip(axes[0], sheets.items(), strict=True):
        axis.imshow(trainee.tiled(samples).numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    save(figure, path)


def _parser(trainee: Trainee, about: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=f"python -m bench.train_{trainee.name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--steps", type=int, default=trainee.recipe.steps)
    p.add_argument("--batch", type=int, default=trainee.recipe.batch)
    p.add_argument("--out", type=Path, default=trainee.folder)
    p.add_argument("--threads", type=int, default=1, help="part of what makes runs equal")
    p.add_argument("--samples", type=int, default=100, help="for sample accuracy")
    p.add_argument("--picture", type=Path, help="write a contact sheet of samples to this file")
    return p
