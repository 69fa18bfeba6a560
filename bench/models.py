# SPDX-License-Identifier: Apache-2.0
"""Models whose steps are timed: the shipped trained one, and others at their real width with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Draw = Callable[..., Tensor]  # noise of a shape


@dataclass
class Subject:
    """A model, the inputs of one run, which block lists a stack cache skips, tokens in a hidden state."""

    name: str
    batch: int
    model: nn.Module
    calls: list[dict[str, Any]]
    lists: tuple[str, ...]
    tokens: int

    @property
    def hidden_bytes(self) -> int:
        """Size of one hidden state."""
        width = self.model.config.num_attention_heads * self.model.config.attention_head_dim
        return self.batch * self.tokens * width * self.calls[0]["hidden_states"].element_size()

    def twin(self) -> nn.Module:
        """The same weights in modules of its own, so that hooks do not meet."""
        shared: dict[int, Any] = {id(t): t for t in self.model.parameters()}
        shared |= {id(t): t for t in self.model.buffers()}
        return copy.deepcopy(self.model, shared)

    def without_blocks(self, kept: int) -> nn.Module:
        """The modules that must still run on a reused step: all but the blocks past the first `kept`."""
        model = self.twin()
        for i, name in enumerate(self.lists):
            blocks = list(getattr(model, name))[: kept if i == 0 else 0]
            setattr(model, name, nn.ModuleList(blocks))
        return model


def trained(batch: int, steps: int, tokens: int = 0, device: str = "cpu") -> Subject:
    """The shipped model on its own noise; latents drift as in a real run."""
    from fastcache.demo.data import encode_labels, position_ids
    from fastcache.demo.model import load_model
    from fastcache.demo.sample import initial_noise, sigmas

    text, pooled = encode_labels(torch.arange(batch) % 10)
    image_ids, text_ids = position_ids()
    noise, levels = initial_noise(batch, 0), sigmas(steps)
    fixed = {"encoder_hidden_states": text, "pooled_projections": pooled}
    fixed |= {"img_ids": image_ids, "txt_ids": text_ids, "return_dict": False}
    calls = [
        {**fixed, "hidden_states": noise * s, "timestep": torch.full((batch,), s)}
        for s in levels[:-1]
    ]
    length = noise.shape[1] + text.shape[1]
    return Subject("digits", batch, load_model(), calls, FLUX, length)


@dataclass(frozen=True)
class Random:
    """A model of diffusers at its real width with random weights, perhaps of a few blocks."""

    name: str
    kind: str  # the class
    fields: dict[str, Any]
    lists: tuple[str, ...]
    inputs: Callable[[int, int, Draw], tuple[dict[str, Any], int]]  # and tokens of a hidden state
    scale: float  # the first timestep

    def __call__(self, batch: int, steps: int, tokens: int, device: str) -> Subject:
        import diffusers

        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: Any = getattr(diffusers, self.kind)(**self.fields)
        finally:
            torch.set_default_dtype(default)
        model.eval().requires_grad_(False)
        g = torch.Generator(device).manual_seed(0)
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.6 / (p.numel() // p.shape[0]) ** 0.5, generator=g)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device, dtype=dtype)

        inputs, length = self.inputs(batch, tokens, draw)
        calls = [
            {
                **inputs,
                "timestep": inputs["hidden_states"].new_full((batch,), t),
                "return_dict": False,
            }
            for t in torch.linspace(self.scale, self.scale / steps, steps).tolist()
        ]
        return Subject(self.name, batch, model, calls, self.lists, length)


def text_for(tokens: int, most: int) -> int:
    """Tokens of a prompt: as many as the model takes, fewer beside few tokens of the image."""
    return most if tokens >= 1024 else 64


def of_flux(batch: int, tokens: int, draw: Draw) -> tuple[dict[str, Any], int]:
    side, text = int(tokens**0.5), text_for(tokens, 512)
    fixed = {
        "encoder_hidden_states": draw(batch, text, 4096),
        "pooled_projections": draw(batch, 768),
    }
    latents = draw(batch, side * side, 64)
    at = torch.arange(side * side, device=latents.device)
    ids = torch.stack([torch.zeros_like(at), at // side, at % side], 1).to(latents.dtype)
    fixed |= {"img_ids": ids, "txt_ids": ids.new_zeros(text, 3)}
    return {**fixed, "hidden_states": latents}, side * side + text


def of_wan(batch: int, tokens: int, draw: Draw) -> tuple[dict[str, Any], int]:
    """One latent frame; text is no part of the hidden state."""
    side = int(tokens**0.5)
    fixed = {"encoder_hidden_states": draw(batch, text_for(tokens, 512), 4096)}
    return {**fixed, "hidden_states": draw(batch, 16, 1, 2 * side, 2 * side)}, side * side


def of_cogvideox(batch: int, tokens: int, draw: Draw) -> tuple[dict[str, Any], int]:
    """One latent frame; turned by positions as in the model of 5B."""
    side, text = int(tokens**0.5), text_for(tokens, 226)
    angles = torch.outer(torch.arange(side * side), torch.logspace(0, -4, 64))
    fixed = {"encoder_hidden_states": draw(batch, text, 4096)}
    latents = draw(batch, 1, 16, 2 * side, 2 * side)
    turn = tuple(f(angles).to(latents) for f in (torch.cos, torch.sin))
    return {**fixed, "image_rotary_emb": turn, "hidden_states": latents}, side * side + text


FLUX = ("transformer_blocks", "single_transformer_blocks")


def a_flux(name: str, double: int, single: int) -> Random:
    fields = {"num_layers": double, "num_single_layers": single}
    return Random(name, "FluxTransformer2DModel", fields, FLUX, of_flux, 1.0)


MODELS: dict[str, Callable[[int, int, int, str], Subject]] = {
    "digits": trained,
    "flux": a_flux("FLUX.1 random", 19, 38),
    "flux-slice": a_flux("FLUX width, 1+1 blocks", 1, 1),
    "wan-slice": Random(
        "Wan 1.3B width, 2 blocks",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 2},
        ("blocks",),
        of_wan,
        1000.0,
    ),
    "cogvideox-slice": Random(
        "CogVideoX 5B width, 2 blocks",
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 2, "use_rotary_positional_embeddings": True},
        ("transformer_blocks",),
        of_cogvideox,
        1000.0,
    ),
}
