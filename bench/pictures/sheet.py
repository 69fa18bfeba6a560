# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: samples under their prompts.

python -m bench.pictures.sheet --out docs/images/pictures-sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from .model import GUIDANCE, HEADS, generate, load_model
from .words import PROMPTS

COLUMNS = 8


def write_sheet(
    model: nn.Module, path: Path, steps: int, guidance: float | None = GUIDANCE
) -> None:
    """All prompts as a PNG, eight in a row."""
    images = generate(model, torch.arange(len(PROMPTS)), steps=steps, guidance=guidance)
    draw({"": images}, path)


def draw(sheets: dict[str, Tensor], path: Path) -> None:
    """Sheets of images [B, 3, H, W] below each other, each image under its prompt."""
    from ..figures import new, save

    rows = [(title, chunk) for title, images in sheets.items() for chunk in images.split(COLUMNS)]
    figure, axes = new(len(rows), COLUMNS, 1.25 * COLUMNS, 1.4 * len(rows))
    for axis in axes.flat:
        axis.set_axis_off()
    for title, images in sheets.items():
        line = next(i for i, (name, _) in enumerate(rows) if name == title)
        for i, image in enumerate(images):
            axis = axes[line + i // COLUMNS][i % COLUMNS]
            axis.imshow((image.permute(1, 2, 0).clamp(-1, 1) / 2 + 0.5).cpu().numpy())
            axis.set_title(_short(PROMPTS[i]), fontsize=6)
    save(figure, path)


def _short(prompt: str) -> str:
    return prompt if len(prompt) < 28 else prompt[:25] + "…"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.pictures.sheet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--size", choices=list(HEADS), default="7M")
    p.add_argument("--weights", type=Path, help="another file than the committed one")
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--plain", action="store_true", help="no guidance, as a student wants it")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    guidance = None if args.plain else GUIDANCE
    write_sheet(load_model(args.size, args.weights), args.out, args.steps, guidance)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
