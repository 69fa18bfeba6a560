# SPDX-License-Identifier: Apache-2.0
"""Emoji as training data: about 1,900 pictures with their names.

    npm pack emoji-datasource-google@16.0.0

gives the archive that is read here. Its code and metadata are under the MIT licence (Cal Henderson). The
pictures are Google's Noto Emoji: its image resources are under the Apache licence 2.0, its fonts under the
SIL Open Font License 1.1, and its flags, of third parties, in the public domain or otherwise exempt from copyright.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .words import words

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
IMAGE_SIZE = 32
CELL, BORDER = 64, 1  # pixels of a picture of the sheet, and around it
HELD_OUT = 96
SPLIT_SEED = 0


@dataclass(frozen=True)
class Pictures:
    """One split: images [N, 3, 32, 32] in [-1, 1], and a prompt for each."""

    images: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)


def load_pictures(archive: Path) -> tuple[Pictures, Pictures]:
    """The (train, held-out) splits of the package's `archive`, always the same."""
    if not archive.is_file():
        raise FileNotFoundError(
            f"{archive} is missing; fetch it with `npm pack {PACKAGE}@{VERSION}` and name the file"
        )
    records, sheet = _read(archive)
    images = torch.stack([_picture(sheet, r) for r in records])
    prompts = [" ".join(words(f"{r['subcategory']} {r['name']}")) for r in records]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held_out = (
        Pictures(images[index], tuple(prompts[i] for i in index.tolist()))
        for index in (order[HELD_OUT:], order[:HELD_OUT])
    )
    return train, held_out


def _read(archive: Path) -> tuple[list[dict[str, Any]], Tensor]:
    """What the package says of its pictures, without skin tones, and its sheet [H, W, 4] of bytes."""
    import numpy
    from PIL import Image

    with tarfile.open(archive) as package:

        def member(name: str) -> Any:
            return package.extractfile(f"package/{name}")

        version = json.load(member("package.json"))["version"]
        if version != VERSION:
            raise ValueError(
                f"archive: holds {PACKAGE} {version}; use {VERSION}, so that runs are equal"
            )
        records = [r for r in json.load(member("emoji.json")) if r["category"] != "Component"]
        with Image.open(member(f"img/google/sheets/{CELL}.png")) as image:
            sheet = torch.from_numpy(numpy.array(image.convert("RGBA")))
    return records, sheet


def _picture(sheet: Tensor, record: dict[str, Any]) -> Tensor:
    """One picture on white, [3, 32, 32] in [-1, 1]."""
    pitch = CELL + 2 * BORDER
    left, top = (record[f"sheet_{axis}"] * pitch + BORDER for axis in "xy")
    cell = sheet[top : top + CELL, left : left + CELL].permute(2, 0, 1) / 255
    on_white = 1 - cell[3:] * (1 - cell[:3])
    return functional.avg_pool2d(on_white, CELL // IMAGE_SIZE) * 2 - 1
