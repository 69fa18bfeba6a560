# SPDX-License-Identifier: Apache-2.0
"""Digits as a tiny latent space: 16x16 images, packed 2x2 the way Flux packs latents.

Images are [B, 1, 16, 16] in [-1, 1]; tokens are [B, 64, 4]; a label is an int in 0..9, and
`NULL_LABEL` stands for "no label" (the unconditional half of classifier-free guidance).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from . import require

IMAGE_SIZE = 16
GRID = IMAGE_SIZE // 2
IMAGE_TOKENS = GRID * GRID
CHANNELS = 4
NUM_CLASSES = 10
NULL_LABEL = NUM_CLASSES
TEXT_TOKENS = 4
TEXT_DIM = 16
HELD_OUT = 297
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """One split: images [N, 1, 16, 16] in [-1, 1] and labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits() -> tuple[Digits, Digits]:
    """The (train, held-out) splits of scikit-learn's bundled digits, always the same."""
    require("sklearn")
    from sklearn.datasets import load_digits as load

    raw = load()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16.0  # [N, 1, 8, 8]
    images = functional.interpolate(images, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    images = images.clamp(0, 1) * 2 - 1
    labels = torch.tensor(raw.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def pack(images: Tensor) -> Tensor:
    """[B, 1, 16, 16] -> [B, 64, 4]: one token per 2x2 patch, row by row."""
    patches = images.reshape(-1, GRID, 2, GRID, 2).permute(0, 1, 3, 2, 4)
    return patches.reshape(-1, IMAGE_TOKENS, CHANNELS)


def unpack(tokens: Tensor) -> Tensor:
    """[B, 64, 4] -> [B, 1, 16, 16], the inverse of `pack`."""
    patches = tokens.reshape(-1, GRID, GRID, 2, 2).permute(0, 1, 3, 2, 4)
    return patches.reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)


def encode_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The fixed text encoder: labels [B] in 0..10 -> text [B, 4, 16] and pooled [B, 16].

    A text token is one-hot class (11), one-hot slot (4) and a constant 1, times 2. The pooled
    vector is the same without the slot.
    """
    pooled = torch.zeros(len(labels), TEXT_DIM)
    pooled[:, : NUM_CLASSES + 1] = functional.one_hot(labels, NUM_CLASSES + 1).float()
    pooled[:, -1] = 1.0
    text = pooled.unsqueeze(1).repeat(1, TEXT_TOKENS, 1)
    text[:, :, NUM_CLASSES + 1 : -1] = torch.eye(TEXT_TOKENS)
    return 2 * text, 2 * pooled


def position_ids() -> tuple[Tensor, Tensor]:
    """Rotary ids as Flux builds them: image [64, 3] = (0, row, column), text [4, 3] = 0."""
    image = torch.zeros(GRID, GRID, 3)
    image[..., 1] = torch.arange(GRID)[:, None]
    image[..., 2] = torch.arange(GRID)[None, :]
    return image.reshape(IMAGE_TOKENS, 3), torch.zeros(TEXT_TOKENS, 3)
