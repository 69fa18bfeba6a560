"""What the quality benchmark measures: trained models, how each is sampled and judged, and cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .common import Row

MODES = ("none", "sequential", "batched")  # guidance
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Cell(NamedTuple):
    """What all rows of one comparison have in common."""

    model: str
    dtype: str
    steps: int
    guidance: str

    @property
    def title(self) -> str:
        """The shipped model in fp32 goes without saying."""
        guidance = "no guidance" if self.guidance == "none" else f"{self.guidance} guidance"
        others = [v for v, usual in ((self.model, "flux"), (self.dtype, "fp32")) if v != usual]
        return ", ".join([*others, f"{self.steps} steps", guidance])


@dataclass(frozen=True)
class Subject:
    """One trained model; its samples are [B, ..., 1, 16, 16]."""

    load: Callable[[], nn.Module]
    generate: Callable[..., Tensor]  # (model, labels, **options of fastcache.demo.sample.generate)
    judge: Callable[
        [Tensor, Tensor], Row
    ]  # (samples, labels) -> columns; None where one means nothing
    output: dict[str, Any]  # tensor_format and grid of the model's output


def flux() -> Subject:
    from fastcache.demo import metrics
    from fastcache.demo.data import GRID, load_digits
    from fastcache.demo.model import load_judge, load_model
    from fastcache.demo.sample import generate

    judge, real = load_judge(), load_digits()[0].images

    def columns(images: Tensor, labels: Tensor) -> Row:
        return {
            "accuracy": metrics.accuracy(judge, images, labels),
            "frechet": metrics.frechet(judge, images, real),
        }

    output = {"tensor_format": "BSC", "grid": (GRID, GRID)}
    return Subject(load_model, generate, columns, output)


def video() -> Subject:
    from fastcache.demo.model import load_judge

    from . import video

    judge = load_judge()

    def columns(videos: Tensor, labels: Tensor) -> Row:
        # the judge's features of moved and resized digits are not those of real ones
        return {"accuracy": video.accuracy(judge, videos, labels), "frechet": None}

    output = {"tensor_format": "BCFHW"}
    return Subject(video.load_model, video.generate, columns, output)


SUBJECTS: dict[str, Callable[[], Subject]] = {"flux": flux, "video": video}
NAMES = {"flux": "the shipped model", "video": "a small Wan that draws moving digits"}
