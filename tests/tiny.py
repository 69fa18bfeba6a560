# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight models from diffusers' own classes, and slow fake trajectories for them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ENTRIES: dict[str, dict] = json.loads((Path(__file__).parent / "tiny_models.json").read_text())
UNIT_TIMESTEPS = (
    "Flux",
    "Flux2",
    "Chroma",
    "QwenImage",
    "Lumina2",
)  # timestep in [0, 1], others 0..1000
# keyword that deepens a model, so that head, middle and tail blocks differ
DEPTH = {
    "Flux": ("num_layers", "num_single_layers"),
    "Flux2": ("num_layers", "num_single_layers"),
    "Chroma": ("num_layers", "num_single_layers"),
    "HunyuanVideo": ("num_layers", "num_single_layers"),
    "Kandinsky5": ("num_visual_blocks",),
}


def _make(spec: dict, g: torch.Generator) -> Any:
    ((kind, value),) = spec.items()
    if kind == "v":
        return value
    if kind == "d":
        return {k: _make(v, g) for k, v in value.items()}
    if kind in ("l", "tu"):
        return (list if kind == "l" else tuple)(_make(v, g) for v in value)
    if "const" in value:
        t = torch.full(value["shape"], value["const"])
    elif "values" in value:
        t = torch.tensor(value["values"]).reshape(value["shape"])
    else:
        t = value["noise"] * torch.randn(value["shape"], generator=g)
    return t.to(getattr(torch, value["dtype"]))


def build(name: str, depth: int = 3, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model in eval mode and its inputs; `depth` blocks per list."""
    return build_entry(ENTRIES[name], dict.fromkeys(DEPTH.get(name, ("num_layers",)), depth), seed)


def build_entry(
    entry: dict, override: dict[str, Any] | None = None, seed: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the inputs that an entry of the json files describes."""
    import diffusers

    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    init = {
        k: tuple(v["__tuple__"]) if isinstance(v, dict) and "__tuple__" in v else v
        for k, v in entry["init"].items()
    }
    init.update(override or {})
    model = getattr(diffusers, entry["class"])(**init).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0, 0.6 / math.sqrt(p.numel() // p.shape[0]), generator=g)
    inputs = {k: _make(v, g) for k, v in entry["inputs"].items()}
    if entry["class"].startswith("QwenImage") and diffusers.__version__ < "0.37":
        mask = inputs["encoder_hidden_states_mask"]  # later versions read the mask itself
        inputs["txt_seq_lens"] = mask.sum(1).tolist()
    return model, inputs


def timesteps(name: str, steps: int) -> list[float]:
    """Falling timesteps in the model's own scale."""
    scale = 1.0 if name in UNIT_TIMESTEPS else 1000.0
    return [scale * (1 - i / steps) for i in range(steps)]


def trajectory(
    name: str, inputs: dict[str, Any], steps: int, speed: float = 0.02
) -> list[dict[str, Any]]:
    """Inputs of a run: latents rotate slowly between two fixed noises while the timestep falls."""
    latents: Tensor = inputs["hidden_states"]
    other = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)) * latents.std()
    calls = []
    for i, t in enumerate(timesteps(name, steps)):
        call = copy.deepcopy(inputs)
        angle = speed * i
        call["hidden_states"] = math.cos(angle) * latents + math.sin(angle) * other
        call["timestep"] = torch.full_like(inputs["timestep"], t)
        calls.append(call)
    return calls


def output(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """The output tensor of one call."""
    with torch.no_grad():
        out = model(**call, return_dict=False)
    return out if isinstance(out, Tensor) else out[0]
