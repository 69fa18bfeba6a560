# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-dev without a cache, with one, and with as many steps as the cache computes: seconds, PSNR and pictures.

    python examples/flux.py --out flux_out
    python examples/flux.py --config my_recipe.json    # what `fastcache tune` has found on this model

Not run here: it wants a GPU with 40 GB, the weights of black-forest-labs/FLUX.1-dev and leave to use them. The tests
drive `compare` with a pipeline of the same class and random weights.
"""  # fmt: skip

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fastcache


class Run(NamedTuple):
    """One generation. picture: [height, width, 3] from 0 to 1. psnr: in dB, against the run without a cache."""

    picture: np.ndarray
    seconds: float
    psnr: float
    computed: int


def generate(pipe: Any, given: dict[str, Any], steps: int) -> tuple[np.ndarray, float]:
    """A picture, always of the same noise, and how long it took."""
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    picture = pipe(
        **given, num_inference_steps=steps, generator=generator, output_type="np"
    ).images[0]
    return picture, time.perf_counter() - began  # the picture lies on the host: the GPU is done


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """In dB, of values from 0 to 1."""
    error = float(np.square(picture - reference).mean())
    return -10 * float(np.log10(error)) if error else float("inf")


def compare(pipe: Any, given: dict[str, Any], steps: int, config: Any) -> dict[str, Run]:
    """The three runs by name."""
    generate(pipe, given, 2)  # kernels are compiled, memory is taken
    plain, seconds = generate(pipe, given, steps)
    found = {"no cache": Run(plain, seconds, float("inf"), steps)}
    with fastcache.enable(pipe, config) as cache:
        generate(pipe, given, steps)
        cache.stats.clear()
        picture, seconds = generate(pipe, given, steps)
        computed = cache.stats.computed
        print(cache.summary())
    found["cache"] = Run(picture, seconds, psnr(picture, plain), computed)
    fewer, seconds = generate(pipe, given, computed)  # what one would do without a cache
    found["fewer steps"] = Run(fewer, seconds, psnr(fewer, plain), computed)
    return found


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
    p.add_argument("--config", default="balanced", help="a preset or a recipe file")
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--prompt", default="a lighthouse in the fog, oil on canvas")
    p.add_argument("--out", type=Path, default=Path("flux_out"))
    args = p.parse_args(argv)
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to("cuda")
    given = {"prompt": args.prompt, "guidance_scale": 3.5, "height": 1024, "width": 1024}
    args.out.mkdir(exist_ok=True)
    for name, run in compare(pipe, given, args.steps, args.config).items():
        print(f"{name:<12} {run.computed:>3} steps {run.seconds:7.2f} s {run.psnr:6.1f} dB")
        path = args.out / f"{name.replace(' ', '_')}.png"
        pipe.image_processor.numpy_to_pil(run.picture)[0].save(path)


if __name__ == "__main__":
    main()
