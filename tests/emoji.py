# SPDX-License-Identifier: Apache-2.0
"""A package of pictures as npm packs it, twelve of them, and a model that does something without having learnt it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch

from bench.pictures import data
from bench.pictures import model as pictures

COUNT = 12


def archive(path: Path, version: str = data.VERSION) -> Path:
    """A package of twelve pictures in a row, the first opaque red on its left half and clear on its right."""
    from PIL import Image

    pitch = data.CELL + 2 * data.BORDER
    sheet = Image.new("RGBA", (COUNT * pitch, pitch), (0, 0, 255, 255))
    left, top = data.BORDER, data.BORDER
    sheet.paste((255, 0, 0, 255), (left, top, left + data.CELL // 2, top + data.CELL))
    sheet.paste((0, 0, 0, 0), (left + data.CELL // 2, top, left + data.CELL, top + data.CELL))
    records = [
        {
            "category": "Component" if i == COUNT - 1 else "Food",
            "subcategory": "food-fruit",
            "name": f"FRUIT No {i}",
            "sheet_x": i,
            "sheet_y": 0,
        }
        for i in range(COUNT)
    ]
    png = io.BytesIO()
    sheet.save(png, "PNG")
    files = {
        "package.json": json.dumps({"version": version}).encode(),
        "emoji.json": json.dumps(records).encode(),
        f"img/google/sheets/{data.CELL}.png": png.getvalue(),
    }
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


def awake(**sizes: int) -> torch.nn.Module:
    """A model of random weights; sizes: of `architecture`."""
    model = pictures.build_model(pictures.architecture(**sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model.requires_grad_(False)
