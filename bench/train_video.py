# SPDX-License-Identifier: Apache-2.0
"""Train the video model of the quality benchmark; deterministic for a given torch build.

    python -m bench.train_video

Writes the fp16 checkpoint and its card (recipe, held-out loss, sample accuracy, versions) into
bench/assets, and with --picture some samples. It takes about 15 minutes of one CPU core.
"""

from __future__ import annotations

from torch import Tensor

from fastcache.demo.sample import GUIDANCE
from fastcache.demo.train import Recipe, Task

from . import trainer, video

VIDEOS = Task(
    video.build_model,
    video.denoise,
    lambda images, generator: video.pack(video.animate(images, generator)),
)


def tiled(videos: Tensor) -> Tensor:
    """A video a row, a frame a column: [B, F, 1, H, W] -> [B * H, F * W]."""
    return videos[:, :, 0].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


VIDEO = trainer.Trainee(
    "video",
    VIDEOS,
    Recipe(steps=2800, batch=16),
    video.ARCHITECTURE,
    video.ASSETS,
    (video.MODEL_FILE, video.RECORD_FILE),
    video.load_model,
    video.generate,
    GUIDANCE,
    video.animate,
    lambda judge, videos, labels: {"frame_accuracy": video.accuracy(judge, videos, labels)},
    tiled,
)


def main(argv: list[str] | None = None) -> int:
    return trainer.main(VIDEO, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
