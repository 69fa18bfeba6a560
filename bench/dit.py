# SPDX-License-Identifier: Apache-2.0
"""A trained model of a plain architecture for the quality benchmark: digits, drawn by a small DiT.

Images and latents are [B, 1, 16, 16] in [-1, 1]; patches of 2x2 make 64 tokens of them. Blocks are
modulated by the time and the label alone (adaLN-zero), and there is no text. Labels are those of
`fastcache.demo.data`; the row past the last class of every block's table stands for none.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.demo.data import IMAGE_SIZE, NUM_CLASSES
from fastcache.demo.model import loaded, zero_modulation
from fastcache.demo.sample import integrate

from .video import ASSETS

MODEL_FILE = "dit_digits.safetensors"
RECORD_FILE = "dit_digits.json"

GUIDANCE = 4.0  # what diffusers' DiTPipeline takes by default

ARCHITECTURE: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": 1,
    "num_layers": 6,
    "sample_size": IMAGE_SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": NUM_CLASSES,
}


def build_model(seed: int = 0) -> nn.Module:
    """An untrained DiTTransformer2DModel whose modulation and output are zero, fp32."""
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = DiTTransformer2DModel(**ARCHITECTURE)
    zero_modulation(model)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in model.transformer_blocks:
        # labels are dropped by the training, once for all blocks
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def load_model(path: Path | None = None) -> nn.Module:
    """The committed checkpoint (stored in fp16) as an fp32 model in eval mode."""
    return loaded(build_model(), path or ASSETS / MODEL_FILE, "bench.train_dit")


def denoise(model: nn.Module, latents: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """Predicted velocity (noise - image): latents [B, 1, 16, 16], sigma and labels [B]."""
    return model(
        hidden_states=latents, timestep=1000 * sigma, class_labels=labels, return_dict=False
    )[0]


def generate(model: nn.Module, labels: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
    """Images for labels [B]; options as in `fastcache.demo.sample.generate`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return integrate(partial(denoise, model), noise, labels, **options)
