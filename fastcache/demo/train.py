# SPDX-License-Identifier: Apache-2.0
"""Train the demo's denoiser and judge; deterministic for a given torch build.

    python -m fastcache.demo.train --out build/demo-assets

Writes fp16 checkpoints, a JSON record (held-out loss, sample accuracy, seeds, versions) and the
loss curve. The 2800 default steps take 15 to 25 minutes on one CPU core; `--steps 20` is a check
that the loss falls.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import require
from .data import NULL_LABEL, Digits, load_digits, pack
from .loss_curve import CURVE_FILE, History, plot_history
from .metrics import accuracy, frechet
from .model import (
    ARCHITECTURE,
    JUDGE_FILE,
    MODEL_FILE,
    RECORD_FILE,
    Judge,
    build_model,
    denoise,
    load_judge,
    load_model,
    save_weights,
)
from .sample import GUIDANCE, generate

EVAL_SEED = 20_000


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the torch build."""

    steps: int = 2800
    batch: int = 32
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    final_lr: float = 0.02
    clip: float = 1.0
    ema: float = 0.995
    label_dropout: float = 0.1
    seed: int = 0
    judge_epochs: int = 30


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine down to `final_lr` of the peak."""
    warmup = min(recipe.warmup, recipe.steps // 2)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


@dataclass(frozen=True)
class Task:
    """What is trained: a new model from a seed, its call, and the latents of images [B, 1, 16, 16]."""

    build: Callable[[int], nn.Module]
    denoise: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # latents, sigma [B], labels [B]
    latents: Callable[[Tensor, torch.Generator], Tensor]


IMAGES = Task(build_model, denoise, lambda images, _: pack(images))


def flow_loss(
    task: Task, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity noise - x at z = (1 - s) x + s noise, s logit-normal."""
    x = task.latents(images, generator)
    noise = torch.randn(x.shape, generator=generator)
    s = torch.sigmoid(torch.randn(len(x), generator=generator))
    z = torch.lerp(x, noise, s.reshape(-1, *[1] * (x.dim() - 1)))
    return functional.mse_loss(task.denoise(model, z, s, labels), noise - x)


@torch.no_grad()
def held_out_loss(
    model: nn.Module, data: Digits, repeats: int = 4, batch: int = 99, task: Task = IMAGES
) -> float:
    """Flow loss on `data`, `repeats` fixed draws of noise and level per image."""
    generator = torch.Generator().manual_seed(EVAL_SEED)
    total = 0.0
    for _ in range(repeats):
        for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
            total += flow_loss(task, model, images, labels, generator).item() * len(labels)
    return total / (repeats * len(data))


def train_denoiser(
    recipe: Recipe, train: Digits, held_out: Digits | None = None, task: Task = IMAGES
) -> tuple[nn.Module, History]:
    """The averaged (EMA) model and its history; held-out loss about 14 times if given data."""
    require("tqdm")
    from tqdm import tqdm

    model = task.build(recipe.seed).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    history = History([], [])
    every = max(50, recipe.steps // 14)
    bar = tqdm(range(recipe.steps), desc="denoiser", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = _batch_loss(task, model, recipe, train, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        _update_average(average, model, min(recipe.ema, (step + 1) / (step + 10)))
        history.train.append(loss.item())
        if held_out is not None and (step + 1) % every == 0:
            history.held_out.append((step + 1, held_out_loss(average, held_out, 1, task=task)))
            bar.set_postfix(train=f"{loss:.3f}", held_out=f"{history.held_out[-1][1]:.3f}")
    return average.eval(), history


def train_judge(recipe: Recipe, train: Digits) -> Judge:
    """A classifier trained on `train`, shifted by up to one pixel."""
    require("tqdm")
    from tqdm import tqdm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        judge = Judge().train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
        total = recipe.judge_epochs * math.ceil(len(train) / 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
        for _ in tqdm(range(recipe.judge_epochs), desc="judge", unit="epoch"):
            for index in torch.randperm(len(train)).split(64):
                images = _shift(train.images[index])
                images = images + 0.1 * torch.rand(()) * torch.randn_like(images)
                loss = functional.cross_entropy(
                    judge(images), train.labels[index], label_smoothing=0.02
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return judge.eval().requires_grad_(False)


def sample_quality(
    model: nn.Module, judge: Judge, held_out: Digits, count: int
) -> dict[str, dict[str, Any]]:
    """Judge accuracy and Fréchet distance of `count` samples, without and with guidance."""
    labels = torch.arange(count) % 10
    quality = {}
    for name, guidance in (("unguided", None), ("guided", GUIDANCE)):
        images = generate(model, labels, seed=EVAL_SEED, guidance=guidance)
        quality[name] = {
            "guidance": guidance,
            "steps": 28,
            "samples": count,
            "seed": EVAL_SEED,
            "accuracy": accuracy(judge, images, labels),
            "frechet": frechet(judge, images, held_out.images) if count > 64 else None,
        }
    return quality


def main(argv: list[str] | None = None) -> int:
    """Train, write the assets, measure what was written."""
    require("diffusers", "sklearn", "safetensors", "matplotlib", "tqdm")
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, seed=args.seed, judge_epochs=args.judge_epochs)
    train, held_out = load_digits()

    start = time.perf_counter()
    save_weights(train_judge(recipe, train), args.out / JUDGE_FILE)
    model, history = train_denoiser(recipe, train, held_out)
    save_weights(model, args.out / MODEL_FILE)
    seconds = time.perf_counter() - start
    plot_history(history, args.out / CURVE_FILE)

    # measure the files that ship, not the weights in memory
    record = _record(recipe, history, args.out, held_out, args.samples)
    record["training_seconds"] = round(seconds, 1)
    record["threads"] = args.threads
    (args.out / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "history"}, indent=2))
    return check_fall(history)


def _record(
    recipe: Recipe, history: History, out: Path, held_out: Digits, samples: int
) -> dict[str, object]:
    model, judge = load_model(out / MODEL_FILE), load_judge(out / JUDGE_FILE)
    return {
        "format": "fastcache-demo-training",
        "version": 1,
        "architecture": ARCHITECTURE,
        "recipe": asdict(recipe),
        "held_out_loss": held_out_loss(model, held_out),
        "judge_accuracy": accuracy(judge, held_out.images, held_out.labels),
        "samples": sample_quality(model, judge, held_out, samples),
        "versions": versions(),
        "history": {
            "train": [round(loss, 4) for loss in history.train],
            "held_out": [[step, round(loss, 4)] for step, loss in history.held_out],
        },
    }


def versions() -> dict[str, str]:
    """What a training run depends on besides its recipe."""
    import diffusers
    import sklearn

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "sklearn": sklearn.__version__,
    }


def check_fall(history: History) -> int:
    tail = max(1, len(history.train) // 4)
    first, last = sum(history.train[:tail]) / tail, sum(history.train[-tail:]) / tail
    fell = last < first
    print(f"training loss {first:.3f} -> {last:.3f}: {'fell' if fell else 'did NOT fall'}")
    return 0 if fell else 1


def _batch_loss(
    task: Task, model: nn.Module, recipe: Recipe, train: Digits, generator: torch.Generator
) -> Tensor:
    index = torch.randint(len(train), (recipe.batch,), generator=generator)
    dropped = torch.rand(recipe.batch, generator=generator) < recipe.label_dropout
    labels = train.labels[index].masked_fill(dropped, NULL_LABEL)
    return flow_loss(task, model, train.images[index], labels, generator)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - decay)


def _shift(images: Tensor) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel along both axes."""
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)  # [B,1,3,3,16,16]
    row, column = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, row, column]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastcache.demo.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--out", type=Path, default=Path("demo_assets"))
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1, help="part of what makes runs equal")
    parser.add_argument("--samples", type=int, default=200, help="images for sample accuracy")
    parser.add_argument("--judge-epochs", type=int, default=Recipe.judge_epochs)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
