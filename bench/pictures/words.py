# SPDX-License-Identifier: Apache-2.0
"""The text encoder: every word is a fixed random vector, seeded by the word itself.

Nothing is learnt and nothing is stored, so that any word can be asked for, and the trained model alone is
enough to draw.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

TEXT_TOKENS = 6
TEXT_DIM = 128
NULL = -1  # label of the empty prompt: the last row of a table of texts
STOP = frozenset("a and for in of on or the to with".split())

# what the benchmarks draw; all of them are prompts of the training data
PROMPTS = (
    "food fruit cherries",
    "animal mammal panda face",
    "sky weather rainbow",
    "face smiling grinning",
    "food fruit watermelon",
    "transport ground bus",
    "plant flower sunflower",
    "heart blue",
    "food fruit tangerine",
    "sport soccer ball",
    "animal mammal fox face",
    "transport air rocket",
    "place map earth globe europe africa",
    "food prepared slice pizza",
    "animal amphibian frog face",
    "sky weather crescent moon",
    "place geographic volcano",
    "food fruit red apple",
    "animal bird penguin",
    "face glasses smiling sunglasses",
    "transport water sailboat",
    "plant other cactus",
    "animal marine tropical fish",
    "food sweet doughnut",
    "event balloon",
    "place building house",
    "animal bug butterfly",
    "sky weather umbrella",
    "plant other mushroom",
    "transport ground taxi",
    "animal mammal cat face",
    "food fruit lemon",
)


def words(text: str) -> tuple[str, ...]:
    """The first six different words of `text` that say something, in lower case."""
    found = (w for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in STOP)
    return tuple(dict.fromkeys(found))[:TEXT_TOKENS]


@functools.cache
def vector(word: str) -> Tensor:
    """[128], standard normal, the same in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
    return torch.randn(TEXT_DIM, generator=generator)


def table(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts [N + 1, 6, 128] and pooled [N + 1, 128] of N prompts; the last row is the null prompt.

    A missing word is a zero token. The pooled vector is the sum of the words over the root of their number.
    """
    text = torch.zeros(len(prompts) + 1, TEXT_TOKENS, TEXT_DIM)
    pooled = torch.zeros(len(prompts) + 1, TEXT_DIM)
    for row, prompt in enumerate(prompts):
        vectors = torch.stack([vector(w) for w in words(prompt)])
        text[row, : len(vectors)] = vectors
        pooled[row] = vectors.sum(0) / len(vectors) ** 0.5
    return text, pooled
