# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image with guidance in two calls: one run measures it, and a threshold follows from the share to compute.

    python examples/qwen_image.py --share 0.5    # half of the steps computed; the measurement is kept for the next time

Not run here: it wants a GPU with 60 GB and the weights of Qwen/Qwen-Image. The tests drive `measure` and `generate`
with a pipeline of the same class and random weights.
"""  # fmt: skip

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import fastcache
from fastcache import Calibration, FirstBlock, Recipe, Taylor

GUARDS: dict[str, Any] = {"warmup": 4, "last": True}  # what a forecast needs


def generate(pipe: Any, given: dict[str, Any], steps: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return pipe(**given, num_inference_steps=steps, generator=generator).images[0]


def measure(pipe: Any, given: dict[str, Any], steps: int, path: Path) -> Calibration:
    """What a run with every step computed has shown: from the file, or run now and saved there."""
    if not path.exists():
        run = lambda: generate(pipe, given, steps, seed=1)  # noqa: E731
        fastcache.calibrate(run, pipe, source="examples/qwen_image.py").save(path)
    return Calibration.load(path)


def recipe_for(calibration: Calibration, share: float) -> Recipe:
    """First-block caching with a linear forecast, which computes about this share of the steps."""
    threshold = calibration.first_block_threshold(share, **GUARDS)
    print(f"threshold {threshold:.3g} computes about {share:.0%} of the steps")
    return Recipe(FirstBlock(threshold), Taylor(order=1))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="Qwen/Qwen-Image")
    p.add_argument("--share", type=float, default=0.5, help="of the steps, to compute")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--prompt", default='a bookshop window with a sign that says "open"')
    p.add_argument("--calibration", type=Path, default=Path("qwen_image.json"))
    p.add_argument("--out", type=Path, default=Path("qwen_image.png"))
    args = p.parse_args(argv)
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to("cuda")
    given = {"prompt": args.prompt, "negative_prompt": " ", "true_cfg_scale": 4.0}
    calibration = measure(pipe, given, args.steps, args.calibration)
    with fastcache.enable(pipe, recipe_for(calibration, args.share)) as cache:
        # the pipeline opens a context for each branch, "cond" and "uncond": each has a history of its own
        generate(pipe, given, args.steps).save(args.out)
        print(cache.summary())


if __name__ == "__main__":
    main()
