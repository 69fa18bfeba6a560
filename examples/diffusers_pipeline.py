# SPDX-License-Identifier: Apache-2.0
"""A diffusers pipeline end to end: load, cache, generate, look at what was saved, give it back.

    python examples/diffusers_pipeline.py --model black-forest-labs/FLUX.1-dev --device cuda
    python examples/diffusers_pipeline.py     # a small DiT with random weights, which needs no download

The cache is attached to every denoiser of the pipeline, each of its calls is one run, and nothing else changes.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import fastcache


def small() -> Any:
    """A class-conditional DiT pipeline with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", help="of the hub; without it a small one with random weights")
    p.add_argument("--device", default="cpu")
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--config", default="balanced", help="a preset or a recipe file")
    p.add_argument("--prompt", default="a lighthouse in the fog")
    args = p.parse_args(argv)
    if args.model:
        from diffusers import DiffusionPipeline

        pipe: Any = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
        given: dict[str, Any] = {"prompt": args.prompt}
    else:
        pipe, given = small(), {"class_labels": [207], "output_type": "np"}
    pipe.to(args.device)

    def generate() -> tuple[Any, float]:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        images = pipe(**given, num_inference_steps=args.steps, generator=generator).images
        return images[0], time.perf_counter() - began

    image, plain = generate()
    with fastcache.enable(pipe, args.config) as cache:
        cached_image, cached = generate()
        print(cache.summary())
    print(f"{plain:.2f} s without a cache, {cached:.2f} s with it")
    return {"plain": image, "cached": cached_image, "reused": cache.stats.reused}


if __name__ == "__main__":
    main()
