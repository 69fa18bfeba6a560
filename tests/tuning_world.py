# SPDX-License-Identifier: Apache-2.0
"""A small flow whose cost and error are known: blocks tick a clock, and the velocity turns slowly or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcache

BLOCKS, WIDTH, TOKENS = 4, 6, 5


class Ticks:
    """Seconds that have passed in this world: one per block that runs, a little per call."""

    now = 0.0


class Block(nn.Module):
    """Adds a part of a velocity that depends on the latents and on time."""

    def __init__(self, number: int, turning: float) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.number, self.turning = number, turning

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        Ticks.now += 1.0
        phase = self.turning * time + self.number
        return hidden_states + 0.4 * torch.sin(phase) * torch.tanh(self.mix(hidden_states))


class Flow(nn.Module):
    """Velocity of latents [B, TOKENS, WIDTH] at a time from 1 down to 0. turning 0: the same all along the way."""

    def __init__(self, turning: float = 2.0, straight: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList(Block(i, turning) for i in range(BLOCKS))
        self.straight = straight
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        Ticks.now += 0.125
        x = torch.ones_like(hidden_states) if self.straight else hidden_states
        for block in self.transformer_blocks:
            x = block(x, timestep)
        return x - hidden_states if not self.straight else x


def generation(model: nn.Module) -> Callable[..., Tensor]:
    """A hand-written Euler loop."""

    def generate(cache: Any, num_inference_steps: int = 16, seed: int = 0) -> Tensor:
        x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        for i in range(num_inference_steps):
            time = 1 - i / num_inference_steps
            with cache.context(
                step_index=i, num_inference_steps=num_inference_steps, timestep=1000 * time
            ):
                x = x - model(x, torch.tensor(time)) / num_inference_steps
        return x.reshape(2, 1, TOKENS, WIDTH)

    return generate


@pytest.fixture
def clock(monkeypatch):
    """The world's clock in place of the machine's."""
    Ticks.now = 0.0
    monkeypatch.setattr("time.thread_time", lambda: Ticks.now)
    monkeypatch.setattr("time.perf_counter", lambda: Ticks.now)


def tuned(model: nn.Module, generate: Any = None, **options: Any) -> fastcache.Tuning:
    """A tuning without a progress line, at 16 steps unless another number is given."""
    options = {"steps": 16, "progress": False} | options
    return fastcache.tune(generate or generation(model), model, **options)


def fingerprint(model: nn.Module) -> list[Any]:
    """What enabling a cache changes of a model."""
    return [
        (name, type(m), sorted(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
