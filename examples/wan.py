# SPDX-License-Identifier: Apache-2.0
"""Wan 2.2 with its two experts, offloaded to the host while they wait, under one cache with a limit on its memory.

    python examples/wan.py --out wan.mp4

Not run here: it wants a GPU with 80 GB and the weights of Wan-AI/Wan2.2-T2V-A14B-Diffusers. The tests drive
`generate` with a pipeline of the same class, two experts and random weights.
"""  # fmt: skip

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import fastcache

GIB = 2**30


def generate(
    pipe: Any, given: dict[str, Any], steps: int, config: Any, limit: int
) -> dict[str, Any]:
    """Frames, seconds, and how many steps of each expert were computed and reused."""
    # both experts are hooked; each has its own stretch of the schedule, the second one begins a run of its own
    with fastcache.enable(pipe, config, max_bytes=limit) as cache:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        frames = pipe(**given, num_inference_steps=steps, generator=generator).frames[0]
        seconds = time.perf_counter() - began
        print(cache.summary())
        counts: dict[str, dict[str, int]] = {}
        for record in cache.stats:
            own = counts.setdefault(record.model, {"compute": 0, "reuse": 0})
            own[record.action] += 1
    return {"frames": frames, "seconds": seconds, "experts": counts}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    p.add_argument("--config", default="balanced", help="a preset or a recipe file")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--frames", type=int, default=81)
    p.add_argument("--prompt", default="a heron takes off from a misty lake at dawn")
    p.add_argument("--max-gib", type=float, default=8.0, help="what cached tensors may take")
    p.add_argument("--out", default="wan.mp4")
    args = p.parse_args(argv)
    from diffusers import AutoencoderKLWan, WanPipeline
    from diffusers.utils import export_to_video

    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(args.model, vae=vae, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()  # before or after `enable`, as one likes
    given = {
        "prompt": args.prompt,
        "height": 720,
        "width": 1280,
        "num_frames": args.frames,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
    }
    found = generate(pipe, given, args.steps, args.config, int(args.max_gib * GIB))
    for expert, count in found["experts"].items():
        print(f"{expert}: {count['compute']} calls computed, {count['reuse']} reused")
    print(f"{found['seconds']:.1f} s, {export_to_video(found['frames'], args.out, fps=16)}")


if __name__ == "__main__":
    main()
