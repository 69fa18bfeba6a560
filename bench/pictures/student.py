# SPDX-License-Identifier: Apache-2.0
"""A student of few steps: it learns the mean velocity of its teacher's guided run from one of its levels to the next.

The teacher's runs are made beforehand and kept, so that all levels are learnt at once; guidance is part of what
is learnt, so that the student needs one call per step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcache.demo.metrics import psnr
from fastcache.demo.solvers import sigmas

from . import model as pictures
from . import training
from .words import NULL, table

CHUNK = 32  # runs of the teacher at a time, and in a file


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """Everything that decides the result, apart from teacher, prompts, torch build, device and threads."""

    lr: float = 4e-4
    warmup: int = 100
    flat: int = 1000
    ema: float = 0.998
    label_dropout: float = 0.0
    levels: int = 8  # steps of the student
    each: int = 4  # steps of the teacher in one of them
    guidance: float = pictures.GUIDANCE  # of the teacher
    runs: int = 2  # of the teacher for each prompt


@dataclass(frozen=True)
class Runs:
    """Runs of the teacher at the student's levels, latents [N, levels + 1, 64, 48] in fp16; run i has prompt i % P."""

    latents: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.latents)


class Student(training.Training):
    """Distillation of a teacher, from its weights on."""

    def __init__(
        self,
        fields: dict[str, Any],
        recipe: Recipe,
        teacher: nn.Module,
        runs: Runs,
        device: str = "cpu",
    ) -> None:
        super().__init__(fields, recipe, teacher, device)
        self.recipe: Recipe = recipe
        self.data, self.levels = runs, torch.tensor(sigmas(recipe.levels))
        self.texts = table(runs.prompts)

    @property
    def sampled(self) -> dict[str, Any]:  # type: ignore[override]
        return {"steps": self.recipe.levels, "guidance": None}

    def loss(self) -> Tensor:
        size, generator = (self.recipe.batch,), self.generator
        index = torch.randint(len(self.data), size, generator=generator)
        level = torch.randint(self.recipe.levels, size, generator=generator)
        return self._loss(self.model, self.data, self.texts, index, level)

    @torch.no_grad()
    def held_out_loss(self, data: Runs, repeats: int = 1) -> float:
        """Loss of the average on all levels of other runs."""
        texts, index = table(data.prompts), torch.arange(len(data))
        levels = (torch.full_like(index, k) for k in range(self.recipe.levels))
        losses = [self._loss(self.average, data, texts, index, level) for level in levels]
        return float(torch.stack(losses).mean())

    def _loss(
        self,
        model: nn.Module,
        data: Runs,
        texts: tuple[Tensor, Tensor],
        index: Tensor,
        level: Tensor,
    ) -> Tensor:
        """Mean squared error of the velocity from one level to the next."""
        here, there = (data.latents[index, at].float() for at in (level, level + 1))
        sigma, following = self.levels[level], self.levels[level + 1]
        mean = (there - here) / (following - sigma)[:, None, None]
        found = self.denoise(model, texts, here, sigma, index % len(data.prompts))
        return functional.mse_loss(found, mean)


def teach(
    teacher: nn.Module, prompts: Sequence[str], recipe: Recipe, folder: Path, seed: int = 0
) -> Iterator[Tensor]:
    """The teacher's runs, a chunk [CHUNK, levels + 1, 64, 48] at a time; those that `folder` holds are read."""
    folder.mkdir(parents=True, exist_ok=True)
    count = recipe.runs * len(prompts)
    texts = table(prompts)
    for start in range(0, count, CHUNK):
        file = folder / f"{start:06d}.pt"
        if not file.exists():
            labels = torch.arange(start, min(start + CHUNK, count)) % len(prompts)
            generator = torch.Generator().manual_seed(seed + start)
            shape = (len(labels), pictures.IMAGE_TOKENS, pictures.CHANNELS)
            noise = torch.randn(shape, generator=generator)
            found = _runs(teacher, texts, noise, labels, recipe)
            draft = file.with_suffix(".draft")
            torch.save(found, draft)
            os.replace(draft, file)
        yield torch.load(file, weights_only=True)


@torch.no_grad()
def _runs(
    teacher: nn.Module,
    texts: tuple[Tensor, Tensor],
    latents: Tensor,
    labels: Tensor,
    recipe: Recipe,
) -> Tensor:
    """Guided Euler runs, kept in fp16 at the student's levels."""
    both, kept = torch.cat([labels, torch.full_like(labels, NULL)]), [latents]
    cast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast)
    steps = list(pairwise(sigmas(recipe.levels * recipe.each)))
    for i, (sigma, following) in enumerate(steps, 1):
        with cast:
            twice = torch.cat([latents, latents])
            found = pictures.denoise(teacher, texts, twice, torch.full((len(both),), sigma), both)
        cond, uncond = found.float().chunk(2)
        latents = latents + (following - sigma) * (uncond + recipe.guidance * (cond - uncond))
        if i % recipe.each == 0:
            kept.append(latents)
    return torch.stack(kept, 1).half()


def distances(
    teacher: nn.Module, student: nn.Module, prompts: Sequence[str], recipe: Recipe, steps: int
) -> dict[str, float]:
    """PSNR in dB to the teacher's guided pictures of `steps` steps, same noise: by who draws and in how many."""
    draw = partial(pictures.generate, labels=torch.arange(len(prompts)), prompts=prompts, seed=1)
    whole = draw(teacher, steps=steps, guidance=recipe.guidance)
    counts = (recipe.levels // 2, recipe.levels)
    found = {f"student, {n} steps": psnr(draw(student, steps=n), whole) for n in counts}
    for n in (*counts, 2 * recipe.levels):
        found[f"teacher, {n} steps"] = psnr(draw(teacher, steps=n, guidance=recipe.guidance), whole)
    return found
