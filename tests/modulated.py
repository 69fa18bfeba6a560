# SPDX-License-Identifier: Apache-2.0
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


class TabledBlock(toys.Block):
    """Normalised without weights, and modulated by rows of a table and of the timestep, as Wan's are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(toys.DIM, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(0.3 * torch.randn(1, 6, toys.DIM))

    def forward(self, hidden_states, temb=None):  # type: ignore[override]
        shift, scale = (self.scale_shift_table + temb).unbind(1)[:2]
        normal = self.norm1(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        return hidden_states + self.change(normal)


class TabledModel(toys.Model):
    def __init__(self) -> None:
        super().__init__(block=TabledBlock)

    def forward(self, hidden_states, timestep=None):
        hidden = self.embed(hidden_states)
        for block in self._blocks():
            hidden = block(hidden, temb=rows_of(timestep, hidden.dtype))
        return self.proj_out(hidden)


def rows_of(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [B, 6, DIM] that the timestep adds to a table."""
    wave = torch.sin(timestep.to(dtype).reshape(-1, 1, 1) / 300)
    return wave * torch.linspace(0.2, 1.2, 6 * toys.DIM, dtype=dtype).reshape(1, 6, toys.DIM)


ADAPTERS = {
    "modulated": fastcache.BlockAdapter(
        blocks=("blocks",), block=fastcache.Block(modulation=("norm", "emb", "temb"))
    ),
    "tabled": fastcache.BlockAdapter(
        blocks=("blocks",), block=fastcache.Block(modulation=("norm1", "scale_shift_table", "temb"))
    ),
}
ADAPTER = ADAPTERS["modulated"]
