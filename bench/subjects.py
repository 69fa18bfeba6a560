# SPDX-License-Identifier: Apache-2.0
"""What the quality benchmark measures: trained models, how each is sampled and judged, and cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    """One trained model; its samples are [B, ..., C, H, W] in [-1, 1]."""

    load: Callable[[], nn.Module]
    generate: Callable[..., Tensor]  # (model, labels, **options of fastcache.demo.sample.generate)
    judge: Callable[
        [Tensor, Tensor], Row
    ]  # (samples, labels) -> columns; None where one means nothing
    output: dict[str, Any]  # tensor_format and grid of the model's output
    labels: int  # how many there are, counted from 0
    guidance: float  # scale of the cells with guidance
    steps: int | None = None  # that a distilled model was made for


def digits_judge() -> Callable[[Tensor, Tensor], Row]:
    """What is said of still digits."""
    from fastcache.demo import metrics
    from fastcache.demo.data import load_digits
    from fastcache.demo.model import load_judge

    judge, real = load_judge(), load_digits()[0].images

    def columns(images: Tensor, labels: Tensor) -> Row:
        return {
            "accuracy": metrics.accuracy(judge, images, labels),
            "frechet": metrics.frechet(judge, images, real),
        }

    return columns


def flux() -> Subject:
    from fastcache.demo.data import GRID, NUM_CLASSES
    from fastcache.demo.model import load_model
    from fastcache.demo.sample import GUIDANCE, generate

    output = {"tensor_format": "BSC", "grid": (GRID, GRID)}
    return Subject(load_model, generate, digits_judge(), output, NUM_CLASSES, GUIDANCE)


def dit() -> Subject:
    from fastcache.demo.data import NUM_CLASSES

    from . import dit

    output = {"tensor_format": "BCHW"}
    return Subject(dit.load_model, dit.generate, digits_judge(), output, NUM_CLASSES, dit.GUIDANCE)


def video() -> Subject:
    from fastcache.demo.data import NUM_CLASSES
    from fastcache.demo.model import load_judge
    from fastcache.demo.sample import GUIDANCE

    from . import video

    judge = load_judge()

    def columns(videos: Tensor, labels: Tensor) -> Row:
        # the judge's features of moved and resized digits are not those of real ones
        return {"accuracy": video.accuracy(judge, videos, labels), "frechet": None}

    output = {"tensor_format": "BCFHW"}
    return Subject(video.load_model, video.generate, columns, output, NUM_CLASSES, GUIDANCE)


def pictures(size: str, steps: int | None = None) -> Subject:
    """A committed size, or its student of so many steps."""
    from .pictures import model
    from .pictures.words import PROMPTS

    def columns(images: Tensor, labels: Tensor) -> Row:
        # nothing was trained to judge them
        return {"accuracy": None, "frechet": None}

    output = {"tensor_format": "BSC", "grid": (model.GRID, model.GRID)}
    file = None if steps is None else model.ASSETS / model.student_file(size, steps)
    load = partial(model.load_model, size, file)
    return Subject(load, model.generate, columns, output, len(PROMPTS), model.GUIDANCE, steps)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "flux": flux,
    "video": video,
    "dit": dit,
    "pictures": partial(pictures, "7M"),
    "pictures-0.9m": partial(pictures, "0.9M"),
    "pictures-2m": partial(pictures, "2M"),
    "pictures-20m": partial(pictures, "20M"),
    "pictures-student": partial(pictures, "2M", 8),
}
NAMES = {
    "flux": "the shipped model",
    "video": "a small Wan that draws moving digits",
    "dit": "a plain DiT that draws digits",
    "pictures": "a Flux of 7 M parameters that draws pictures from words",
    "pictures-0.9m": "the same of 0.9 M parameters",
    "pictures-2m": "the same of 2 M parameters",
    "pictures-20m": "the same of 20 M parameters",
    "pictures-student": "a student of eight steps of that of 2 M parameters",
}
