# SPDX-License-Identifier: Apache-2.0
"""Two AOTInductor packages, computed and reused step, sharing one cache under a host's schedule.

    python examples/export_aoti.py [folder]

A tiny Wan with random weights where diffusers is installed, else a plain stack of blocks. The loop at the
end is all that a host needs, in any language: pick the package, copy a few numbers, run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastcache

STEPS = 12


class Plain(nn.Module):
    """Four residual blocks."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(4)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def build() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        return Plain(), {"hidden_states": torch.randn(1, 32, 64)}
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=64,
        ffn_dim=32,
        num_layers=4,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([1000.0]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "return_dict": False,
    }


def trajectory(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Latents that drift while the timestep falls."""
    drift = torch.randn_like(inputs["hidden_states"])
    calls = []
    for i in range(STEPS):
        call = {**inputs, "hidden_states": inputs["hidden_states"] + 0.02 * i * drift}
        if "timestep" in call:
            call["timestep"] = torch.tensor([1000.0 * (1 - i / STEPS)])
        calls.append(call)
    return calls


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def main(folder: Path) -> float:
    model, inputs = build()
    model.eval().requires_grad_(False)
    calls = trajectory(inputs)
    config = fastcache.Recipe(fastcache.Interval(3), fastcache.Taylor(1))
    with fastcache.enable(model, config) as cache:
        exported = fastcache.export_variants(model, (), calls[0])
        with cache.context(num_inference_steps=STEPS), torch.no_grad():
            eager = [first(model(**call)).clone() for call in calls]
    packages = {}
    for action, program in exported.variants.items():
        start = time.perf_counter()
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / f"{action}.pt2")
        )
        packages[action] = torch._inductor.aoti_load_package(path)
        nodes, seconds = len(program.graph.nodes), time.perf_counter() - start
        print(f"{action}: {nodes} nodes, compiled in {seconds:.1f} s")

    own = exported.fresh()  # the one cache; both packages write and read it in place
    worst = 0.0
    for step, (action, facts) in enumerate(exported.plan(STEPS)):
        for name, value in facts.items():
            own[name].copy_(value)
        error = (first(packages[action](own, **calls[step])) - eager[step]).abs().max().item()
        worst = max(worst, error)
        print(f"step {step:2d}: {action:<7} differs from eager by {error:.1e}")
    print(
        f"cache: {sum(t.numel() * t.element_size() for t in own.values())} bytes; worst {worst:.1e}"
    )
    return worst


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
