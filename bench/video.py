# SPDX-License-Identifier: Apache-2.0
"""The second trained model of the quality benchmark: moving digits, drawn by a small Wan.

Videos are [B, 6, 1, 16, 16] in [-1, 1]: a digit of 12x12 pixels that moves on a straight line and
bounces off the edges. Latents are [B, 4, 6, 8, 8], every frame packed 2x2 as in the image model;
patches of 2x2 make 96 tokens of them. Labels and text are those of `fastcache.demo.data`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcache.demo import metrics
from fastcache.demo.data import CHANNELS, GRID, IMAGE_SIZE, TEXT_DIM, encode_labels
from fastcache.demo.model import Judge, loaded
from fastcache.demo.sample import integrate

ASSETS = Path(__file__).parent / "assets"
MODEL_FILE = "wan_digits.safetensors"
RECORD_FILE = "wan_digits.json"

FRAMES = 6
DIGIT = 12  # pixels of a digit
REACH = (IMAGE_SIZE - DIGIT) / 2  # pixels that it can move either way from the middle

ARCHITECTURE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 10,
    "rope_max_seq_len": 32,
}


# --- data --------------------------------------------------------------------------------------------


def animate(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits [B, 1, 16, 16] in motion, [B, 6, 1, 16, 16]: up to one pixel a frame along each axis."""
    start, speed = torch.rand(2, len(images), 1, 2, generator=generator)  # [B, 1, (x, y)]
    path = 4 * REACH * start + speed * torch.arange(FRAMES)[:, None]
    place = (path % (4 * REACH) - 2 * REACH).abs() - REACH  # there and back again, [B, 6, 2]
    still = images.repeat_interleave(FRAMES, 0)
    ratio = IMAGE_SIZE / DIGIT
    return _window(still, ratio, -ratio * place.flatten(0, 1)).unflatten(0, (-1, FRAMES))


def centred(frames: Tensor) -> Tensor:
    """Frames [N, 1, 16, 16] as the judge knows digits: the ink in the middle, at full size."""
    ink = frames.clamp(-1, 1) + 1 + 1e-6
    o = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
    x, y = (ink * o).sum((1, 2, 3)), (ink * o[:, None]).sum((1, 2, 3))
    middle = torch.stack([x, y], 1) / ink.sum((1, 2, 3))[:, None]
    return _window(frames, DIGIT / IMAGE_SIZE, middle)


def _window(images: Tensor, scale: float, middle: Tensor) -> Tensor:
    """What a window `scale` times as wide around `middle` [N, (x, y)], in pixels, shows of images."""
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = middle / (IMAGE_SIZE / 2)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    # the background is -1, what lies outside is 0
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def pack(videos: Tensor) -> Tensor:
    """[B, F, 1, 16, 16] -> [B, 4, F, 8, 8]."""
    return functional.pixel_unshuffle(videos, 2).transpose(1, 2).contiguous()


def unpack(latents: Tensor) -> Tensor:
    """[B, 4, F, 8, 8] -> [B, F, 1, 16, 16], the inverse of `pack`."""
    return functional.pixel_shuffle(latents.transpose(1, 2), 2)


# --- model -------------------------------------------------------------------------------------------


def build_model(seed: int = 0) -> nn.Module:
    """An untrained WanTransformer3DModel whose modulation and output are zero, fp32."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = WanTransformer3DModel(**ARCHITECTURE)
    projections = (model.condition_embedder.time_proj, model.proj_out)
    tables = (block.scale_shift_table for block in model.blocks)
    for p in (*(p for layer in projections for p in layer.parameters()), *tables):
        nn.init.zeros_(p)
    return model


def load_model(path: Path | None = None) -> nn.Module:
    """The committed checkpoint (stored in fp16) as an fp32 model in eval mode."""
    return loaded(build_model(), path or ASSETS / MODEL_FILE, "bench.train_video")


def denoise(model: nn.Module, latents: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """Predicted velocity (noise - video): latents [B, 4, F, 8, 8], sigma and labels [B]."""
    return model(
        hidden_states=latents,
        encoder_hidden_states=encode_labels(labels)[0].to(latents.dtype),
        timestep=1000 * sigma,
        return_dict=False,
    )[0]


# --- samples -----------------------------------------------------------------------------------------


def generate(model: nn.Module, labels: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
    """Videos for labels [B]; options as in `fastcache.demo.sample.generate`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), CHANNELS, FRAMES, GRID, GRID, generator=generator)
    return unpack(integrate(partial(denoise, model), noise, labels, **options))


def accuracy(judge: Judge, videos: Tensor, labels: Tensor) -> float:
    """Share of frames that the image judge, trained on full-size digits, reads as their label."""
    frames = centred(videos.flatten(0, 1))
    return metrics.accuracy(judge, frames, labels.repeat_interleave(FRAMES))
