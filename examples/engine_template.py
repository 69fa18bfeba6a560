# SPDX-License-Identifier: Apache-2.0
"""What to write to have an engine of your own run on fastcache: copy this, and put your engine in place of `Engine`.

    python examples/engine_template.py

An engine has denoisers, a method that runs a generation, or requests that take turns; `Attached` is told of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastcache
from fastcache.integrations.attached import Attached


class Denoiser(nn.Module):
    """Blocks in a list; yours are larger."""

    def __init__(self, width: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor, t: float, text: Tensor) -> Tensor:
        for stage in self.stages:
            x = x + 0.1 * torch.tanh(stage(x) + text) * (1 + t)
        return x


class Engine:
    """Stands for an engine: one denoiser, and a generation with guidance in two calls."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Denoiser().eval()

    def step(self, x: Tensor, i: int, steps: int) -> Tensor:
        t = 1 - i / steps
        cond, uncond = (self.model(x, t, torch.full((16,), text)) for text in (0.5, 0.0))
        return x - (uncond + 3 * (cond - uncond)) / steps

    @torch.no_grad()
    def generate(self, steps: int = 20) -> Tensor:
        x = torch.ones(1, 8, 16)
        for i in range(steps):
            x = self.step(x, i, steps)
        return x


class FastcacheBackend:
    """The file that you write: enable, refresh, slots, statistics, disable."""

    def __init__(self, engine: Engine, config: Any = "balanced") -> None:
        # where the blocks are; left out, lists with usual names are found
        where = fastcache.BlockAdapter(blocks=("stages",))
        self.attached = Attached(engine.model, config, adapter=where)
        # a method that is one generation: each call of it begins anew and is forgotten at its end
        self.attached.announce(engine, "generate")

    def refresh(self, num_inference_steps: int) -> None:
        """The engine says how long the next generation is, where it knows."""
        self.attached.refresh(num_inference_steps)

    def slot(self, num_inference_steps: int) -> Any:
        """A request that takes turns with others: resume() before its calls, pause() after, clear() at its end."""
        return self.attached.slot(num_inference_steps)

    def disable(self) -> None:
        self.attached.close()


@torch.no_grad()
def main() -> dict[str, Any]:
    engine = Engine()
    plain = engine.generate()
    backend = FastcacheBackend(engine, fastcache.Recipe(fastcache.Interval(3), fastcache.Taylor(1)))
    backend.refresh(num_inference_steps=20)
    cached = engine.generate()
    taking_turns = []
    slots = [backend.slot(20) for _ in range(2)]
    states = [torch.ones(1, 8, 16), torch.full((1, 8, 16), 0.5)]
    for i in range(20):
        for number, slot in enumerate(slots):
            slot.resume()
            states[number] = engine.step(states[number], i, 20)
            slot.pause()
    for slot, state in zip(slots, states, strict=True):
        slot.clear()
        taking_turns.append(state)
    print(backend.attached.statistics())
    found = {"plain": plain, "cached": cached, "turns": taking_turns}
    found["statistics"] = backend.attached.statistics()
    backend.disable()
    found["after"] = engine.generate()
    return found


if __name__ == "__main__":
    main()
