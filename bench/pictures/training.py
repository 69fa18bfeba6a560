# SPDX-License-Identifier: Apache-2.0
"""Training that stops and goes on at any step: the same bits come out as without a stop."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcache.demo.loss_curve import History
from fastcache.demo.train import EVAL_SEED, Task, flow_loss

from . import model as pictures
from .data import Pictures
from .words import NULL, table


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from data, size, torch build, device and threads."""

    batch: int = 32
    lr: float = 8e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 200
    flat: int = 3000  # steps at the full rate
    clip: float = 1.0
    ema: float = 0.999
    label_dropout: float = 0.1
    seed: int = 0
    autocast: bool = True  # matrices in bf16, weights and sums in fp32


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a plateau, then down with the root of the step: no end has to be known."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    return recipe.lr * rise * math.sqrt(recipe.flat / max(recipe.flat, step + 1))


class Training:
    """A model in training, its average, and all that the next step depends on; what is learnt is the subclass's."""

    sampled: ClassVar[dict[str, Any]] = {}  # options of the pictures that are looked at

    def __init__(
        self, fields: dict[str, Any], recipe: Recipe, model: nn.Module, device: str = "cpu"
    ) -> None:
        self.fields, self.recipe, self.device = fields, recipe, device
        self.model = model.train().requires_grad_(True).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)
        self.history = History([], [])

    @property
    def steps(self) -> int:
        """How many have been taken."""
        return len(self.history.train)

    def loss(self) -> Tensor:
        """Of the next batch, which the generator draws."""
        raise NotImplementedError

    def held_out_loss(self, data: Any, repeats: int = 2) -> float:
        """Loss of the average on `data`, which is not trained on."""
        raise NotImplementedError

    def step(self) -> float:
        """Take one, and return its loss."""
        recipe, done = self.recipe, self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, done)
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        with torch.no_grad():
            decay = min(recipe.ema, (done + 1) / (done + 10))
            for old, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
        self.history.train.append(loss.item())
        return self.history.train[-1]

    def save(self, path: Path) -> None:
        """Write all that `resume` needs; a run that is killed meanwhile leaves the file before."""
        state = {
            "fields": self.fields,
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "history": asdict(self.history),
        }
        draft = path.with_suffix(".draft")
        torch.save(state, draft)
        os.replace(draft, path)

    def resume(self, path: Path) -> None:
        """Go on where `save` left off."""
        state = torch.load(path, weights_only=True)
        for name, mine in (("fields", self.fields), ("recipe", asdict(self.recipe))):
            if state[name] != mine:
                raise ValueError(
                    f"{name}: {path} was trained with {state[name]}, not {mine}; name another folder"
                )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.history = History(**state["history"])

    def denoise(
        self,
        model: nn.Module,
        texts: tuple[Tensor, Tensor],
        tokens: Tensor,
        sigma: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """The model's call on prompts; what goes in and comes out lies on the host."""
        text, pooled, *there = (t.to(self.device) for t in (*texts, tokens, sigma, labels))
        cast = torch.autocast(self.device, torch.bfloat16, enabled=self.recipe.autocast)
        with cast, sdpa_kernel(SDPBackend.MATH):  # on CPUs faster backwards than flash
            return pictures.denoise(model, (text, pooled), *there).float().cpu()


class Trainer(Training):
    """Flow matching on pictures and their prompts."""

    sampled: ClassVar[dict[str, Any]] = {"steps": 20, "guidance": pictures.GUIDANCE}

    def __init__(
        self, fields: dict[str, Any], recipe: Recipe, train: Pictures, device: str = "cpu"
    ) -> None:
        super().__init__(fields, recipe, pictures.build_model(fields, recipe.seed), device)
        self.data, self.tokens = train, pictures.pack(train.images)
        self.task = self._task(train)

    def loss(self) -> Tensor:
        recipe = self.recipe
        index = torch.randint(len(self.data), (recipe.batch,), generator=self.generator)
        dropped = torch.rand(recipe.batch, generator=self.generator) < recipe.label_dropout
        labels = index.masked_fill(dropped, NULL)
        return flow_loss(self.task, self.model, self.tokens[index], labels, self.generator)

    @torch.no_grad()
    def held_out_loss(self, data: Pictures, repeats: int = 2) -> float:
        """Loss of the average on `data`, with as many fixed draws of noise and level per picture."""
        generator, task = torch.Generator().manual_seed(EVAL_SEED), self._task(data)
        tokens, labels = pictures.pack(data.images), torch.arange(len(data))
        losses = [flow_loss(task, self.average, tokens, labels, generator) for _ in range(repeats)]
        return float(torch.stack(losses).mean())

    def _task(self, data: Pictures) -> Task:
        """The model's call on `data`'s prompts."""
        texts = table(data.prompts)

        def denoise(model: nn.Module, tokens: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            return self.denoise(model, texts, tokens, sigma, labels)

        build = partial(pictures.build_model, self.fields)
        return Task(build, denoise, lambda tokens, _: tokens)
