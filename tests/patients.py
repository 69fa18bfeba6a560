# SPDX-License-Identifier: Apache-2.0
"""Models and pipelines for `fastcache doctor`, well and not so well."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        return x + 0.1 * self.mix(x)


class Plain(nn.Module):
    """Blocks of a class that nobody knows."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Pipeline:
    """One that opens no contexts."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)

    def __call__(self, num_inference_steps: int = 12):
        with torch.no_grad():
            return [self.transformer(x) for x in torch.ones(num_inference_steps, 1, 4, 8)]


class Uncallable:
    def __init__(self) -> None:
        self.transformer = eval_model()


def eval_model(depth: int = 3) -> Plain:
    torch.manual_seed(0)
    return Plain(depth).eval().requires_grad_(False)


model = eval_model()
pipe = Pipeline(transformer=eval_model())
number = 3


def made():
    return Plain()


def with_a_run():
    """What `fastcache doctor module:function` tries."""
    mine = eval_model()

    def run(cache):
        with cache.run(num_inference_steps=8):
            for i in range(8):
                mine(torch.full((1, 4, 8), 1.0 + 0.1 * i))

    return mine, run


def past_it():
    mine = eval_model()
    return mine, lambda: mine.blocks[0](torch.ones(1, 4, 8))


def raising():
    return eval_model(), lambda: {}["prompt"]


def broken_pair():
    return eval_model(), 3


def asking(path):
    return eval_model()
