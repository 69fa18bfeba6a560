# SPDX-License-Identifier: Apache-2.0
"""The model in four sizes, which differ in width alone, and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcache.demo.model import loaded, predicted, zero_modulation
from fastcache.demo.sample import integrate

from .data import IMAGE_SIZE
from .words import NULL, PROMPTS, TEXT_DIM, TEXT_TOKENS, table

PATCH = 4  # pixels of a token along each axis
GRID = IMAGE_SIZE // PATCH
IMAGE_TOKENS = GRID * GRID
CHANNELS = 3 * PATCH * PATCH
GUIDANCE = 4.0
HEAD = 32
HEADS = {
    "0.9M": 2,
    "2M": 3,
    "7M": 6,
    "20M": 10,
}  # by size; parameters follow the square of the width

ASSETS = Path(__file__).parent.parent / "assets"


def file_of(size: str) -> str:
    return f"flux_pictures_{size.lower()}.safetensors"


def student_file(size: str, steps: int) -> str:
    """Of a model distilled to so many steps."""
    return f"flux_pictures_{size.lower()}_{steps}steps.safetensors"


def architecture(heads: int, double: int = 2, single: int = 8) -> dict[str, Any]:
    """Fields of FluxTransformer2DModel."""
    return {
        "patch_size": 1,
        "in_channels": CHANNELS,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": HEAD,
        "num_attention_heads": heads,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": TEXT_DIM,
        "guidance_embeds": False,
        "axes_dims_rope": (8, 12, 12),
    }


def build_model(fields: dict[str, Any], seed: int = 0) -> nn.Module:
    """An untrained model with zeroed modulation and output layers, fp32."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(nn.Module, FluxTransformer2DModel(**fields))
    zero_modulation(model)
    return model


def load_model(size: str = "7M", path: Path | None = None) -> nn.Module:
    """A checkpoint (stored in fp16), the committed one unless `path` names another, in fp32 and eval mode."""
    model = build_model(architecture(HEADS[size]))
    return loaded(model, path or ASSETS / file_of(size), "bench.pictures.train")


def pack(images: Tensor) -> Tensor:
    """[B, 3, 32, 32] -> [B, 64, 48]."""
    return functional.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor) -> Tensor:
    """[B, 64, 48] -> [B, 3, 32, 32], the inverse of `pack`."""
    planes = tokens.transpose(1, 2).unflatten(2, (GRID, GRID))
    return functional.pixel_shuffle(planes, PATCH)


def position_ids() -> tuple[Tensor, Tensor]:
    """Rotary ids as Flux builds them: image [64, 3] = (0, row, column), text [6, 3] = 0."""
    place = torch.cartesian_prod(torch.arange(1), torch.arange(GRID), torch.arange(GRID))
    return place.float(), torch.zeros(TEXT_TOKENS, 3)


def denoise(
    model: nn.Module,
    texts: tuple[Tensor, Tensor],  # of words.table
    tokens: Tensor,
    sigma: Tensor,
    labels: Tensor,
) -> Tensor:
    """Predicted velocity (noise - image): tokens [B, 64, 48], sigma [B] in [0, 1], labels [B] into `texts`."""
    text, pooled = (t[labels].to(tokens) for t in texts)
    image_ids, text_ids = (ids.to(tokens.device) for ids in position_ids())
    return predicted(model, tokens, sigma, (text, pooled), (image_ids, text_ids))


def generate(
    model: nn.Module,
    labels: Tensor,
    *,
    seed: int = 0,
    prompts: Sequence[str] = PROMPTS,
    **options: Any,
) -> Tensor:
    """Images [B, 3, 32, 32] for labels [B] into `prompts`; options as in `fastcache.demo.sample.generate`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), IMAGE_TOKENS, CHANNELS, generator=generator)
    call = partial(denoise, model, table(prompts))
    return unpack(integrate(call, noise, labels, null=NULL, **options))
