# SPDX-License-Identifier: Apache-2.0
"""What is kept of a training: the weights, a card beside them, and a row of its loss curve for the report."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastcache.demo.model import save_weights
from fastcache.demo.train import versions

from .. import common
from .data import PACKAGE, VERSION, Pictures
from .model import GUIDANCE
from .training import Trainer, Training

Row = common.Row

REPEATS = 8  # draws of noise and level per picture of the losses that are recorded
POINTS = 60  # of a training curve


def export(trainer: Training, card: Row, file: Path) -> Row:
    """Write the average in fp16 and its card beside it; returns the card."""
    save_weights(trainer.average, file)
    found = card | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    file.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def card(trainer: Trainer, held_out: Pictures) -> Row:
    """Of a model trained on pictures."""
    first = Pictures(trainer.data.images[: len(held_out)], trainer.data.prompts[: len(held_out)])
    return origin(trainer) | {
        "format": "fastcache-pictures-training",
        "guidance": GUIDANCE,
        "held_out_loss": trainer.held_out_loss(held_out, REPEATS),
        "train_loss_on_as_many": trainer.held_out_loss(first, REPEATS),
    }


def origin(trainer: Training) -> Row:
    """Licences, architecture, recipe, versions and losses of a training."""
    return {
        "licence": "Apache-2.0",
        "data": f"{PACKAGE} {VERSION}: MIT; pictures: Noto Emoji, Apache-2.0",
        "architecture": trainer.fields,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "recipe": asdict(trainer.recipe),
        "steps": trainer.steps,
        "commit": common.commit(),
        "versions": versions(),
        "history": history(trainer),
    }


def history(trainer: Training) -> dict[str, Any]:
    """(step, loss) pairs: means over stretches of the training, and held out."""
    train = torch.tensor(trainer.history.train)
    window = max(1, len(train) // POINTS)
    means = train.unfold(0, window, window).mean(1).tolist()
    return {
        "train": [[(i + 1) * window, round(x, 4)] for i, x in enumerate(means)],
        "held_out": [[step, round(loss, 4)] for step, loss in trainer.history.held_out],
    }


def keep_row(path: Path, bench: str, size: str, found: Row) -> None:
    """Put a row, made of a card, into the results at `path`, in place of an older one of that benchmark and size."""
    left_out = ("format", "versions", "architecture", "guidance")
    row = {
        "bench": bench,
        "size": size,
        **{k: v for k, v in found.items() if k not in left_out},
    }
    rows = [r for r in common.read_lines(path) if (r["bench"], r["size"]) != (bench, size)]
    rows = [*rows, common.environment() | row]
    common.write_lines(path, sorted(rows, key=lambda r: (r["bench"], r["parameters"])))
