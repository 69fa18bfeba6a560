# SPDX-License-Identifier: Apache-2.0
"""Train the DiT of the quality benchmark; deterministic for a given torch build.

    python -m bench.train_dit

Writes the fp16 checkpoint and its card (recipe, held-out loss, sample accuracy, versions) into
bench/assets, and with --picture some samples. It takes about 10 minutes of one CPU core.
"""

from __future__ import annotations

from torch import Tensor

from fastcache.demo.metrics import accuracy
from fastcache.demo.train import Recipe, Task

from . import dit, trainer

IMAGES = Task(dit.build_model, dit.denoise, lambda images, _: images)


def tiled(images: Tensor) -> Tensor:
    """Two images a row: [B, 1, H, W] -> [B / 2 * H, 2 * W]."""
    return images[:, 0].unflatten(0, (-1, 2)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


DIT = trainer.Trainee(
    "dit",
    IMAGES,
    Recipe(),
    dit.ARCHITECTURE,
    dit.ASSETS,
    (dit.MODEL_FILE, dit.RECORD_FILE),
    dit.load_model,
    dit.generate,
    dit.GUIDANCE,
    lambda images, _: images,
    lambda judge, images, labels: {"accuracy": accuracy(judge, images, labels)},
    tiled,
)


def main(argv: list[str] | None = None) -> int:
    return trainer.main(DIT, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
