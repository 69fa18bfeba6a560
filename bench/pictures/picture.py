# SPDX-License-Identifier: Apache-2.0
"""One picture: the same prompts uncached, cached at half, a third and a quarter of the cost, and fewer steps.

fastcache demo --model pictures --out docs/images/pictures.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastcache
from fastcache import Guided, Mask, Recipe, Stack
from fastcache.demo.metrics import psnr

from .model import GUIDANCE, HEADS, generate, load_model
from .words import PROMPTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 28
# prompts of the contact sheet that the small model draws well
SHOWN = tuple(
    PROMPTS.index(prompt)
    for prompt in (
        "heart blue",
        "face smiling grinning",
        "place map earth globe europe africa",
        "food fruit tangerine",
        "animal mammal cat face",
        "place building house",
        "transport ground taxi",
        "animal amphibian frog face",
    )
)


@dataclass(frozen=True)
class Cached:
    """A line of the picture: how much cheaper, and the steps of 28 that are computed for it."""

    factor: int
    computed: tuple[int, ...]

    def recipe(self) -> Recipe:
        plan = [int(i in self.computed) for i in range(STEPS)]
        return Recipe(Mask(plan, warmup=0, last=False), Guided(1, "modulated"), Stack())


# close together first and wider apart later, which is best with guidance
LINES = (
    Cached(2, (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 17, 20, 23, 26)),
    Cached(3, (0, 1, 2, 3, 5, 8, 12, 17, 22)),
    Cached(4, (0, 1, 2, 4, 8, 13, 20)),
)


def samples(model: nn.Module, steps: int = STEPS, cached: Cached | None = None) -> Tensor:
    """Images [B, 3, 32, 32] of the prompts that are shown, with guidance."""
    options: dict[str, Any] = {"steps": steps, "guidance": GUIDANCE, "seed": 0}
    labels = torch.tensor(SHOWN)
    if cached is None:
        return generate(model, labels, **options)
    with fastcache.enable(model, cached.recipe()) as cache:
        return generate(model, labels, cache=cache, **options)


def draw(model: nn.Module, lines: tuple[Cached, ...] = LINES) -> Figure:
    """Two columns of lines, cached on the left and fewer steps of equal cost on the right."""
    from ..figures import new

    whole = samples(model)
    figure, axes = new(len(lines) + 1, 2, 13.0, 0.95 * (len(lines) + 1) + 0.4)
    for axis in axes[0]:
        _strip(axis, whole, f"uncached, {STEPS} steps")
    for (left, right), line in zip(axes[1:], lines, strict=True):
        computed = len(line.computed)
        for axis, what, images in (
            (
                left,
                f"{line.factor}x: cached, {computed} of {STEPS} computed",
                samples(model, cached=line),
            ),
            (right, f"{line.factor}x: {computed} steps, uncached", samples(model, computed)),
        ):
            _strip(axis, images, f"{what}: {psnr(images, whole):.1f} dB")
    return figure


def _strip(axis: Any, images: Tensor, title: str) -> None:
    """Images beside each other under a title."""
    beside = images.permute(1, 2, 0, 3).flatten(2)  # [3, H, B * W]
    axis.imshow((beside.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy())
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_axis_off()


def main(argv: list[str] | None = None) -> int:
    from ..figures import save

    p = argparse.ArgumentParser(
        prog="fastcache demo --model pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--size", choices=list(HEADS), default="7M")
    p.add_argument("--weights", type=Path, help="another file than the committed one")
    p.add_argument("--out", type=Path, default=Path("demo_out/pictures.png"), help="the picture")
    p.add_argument("--threads", type=int, default=1, help="torch threads")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    save(draw(load_model(args.size, args.weights)), args.out)
    print(f"{args.out}: {', '.join(PROMPTS[i] for i in SHOWN)}")
    return 0
