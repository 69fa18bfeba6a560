"""A small model whose first normalisation has the timestep in it, and the ways to drive a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import toys
from torch import Tensor, nn

import fastcache

WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: model,
    "compiled": lambda model: fastcache.compile(model, backend="aot_eager"),
    "frozen": lambda model: fastcache.compile(model, backend="aot_eager", frozen=True),
}


class Norm(nn.Module):
    """Shifted by the timestep, as adaLN is."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:]) * (1 + emb) - emb


class ModulatedBlock(toys.Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()

    def forward(self, hidden_states, temb=None):  # type: ignore[override]
        return hidden_states + self.change(self.norm(hidden_states, temb))


class ModulatedModel(toys.Model):
    def __init__(self, walk: str = "iterate", lists: tuple[str, ...] = ("blocks",)) -> None:
        super().__init__(block=ModulatedBlock, walk=walk, lists=lists)

    def forward(self, hidden_states, timestep=None):
        hidden, temb = self.embed(hidden_states), torch.sin(timestep / 300).reshape(-1, 1, 1)
        for block in self._blocks():
            hidden = block(hidden, temb=temb)
        return self.proj_out(hidden)


ADAPTER = fastcache.BlockAdapter(
    blocks=("blocks",), block=fastcache.Block(modulation=("norm", "emb", "temb"))
)
