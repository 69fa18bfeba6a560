# SPDX-License-Identifier: Apache-2.0
"""A script of cache-dit's, with one line in front of it.

python examples/from_cache_dit.py             # cache-dit's calls on fastcache's runtime
python examples/from_cache_dit.py --kernels   # cache-dit's own runtime on fastcache's kernels
python examples/from_cache_dit.py --own       # cache-dit alone
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch

from fastcache.demo.model import denoise, load_model
from fastcache.demo.sample import initial_noise, sigmas
from fastcache.integrations import cache_dit as backend


@torch.no_grad()
def generate(model: Any, steps: int) -> torch.Tensor:
    """What a user of cache-dit has: nothing in it knows of fastcache."""
    import cache_dit
    from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

    cache_dit.enable_cache(
        model,
        cache_config=DBCacheConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=0.2,
            max_warmup_steps=4,
            num_inference_steps=steps,
            enable_separate_cfg=False,
        ),
        calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    tokens = initial_noise(1, seed=0)
    for sigma, following in pairwise(sigmas(steps)):
        velocity = denoise(model, tokens, torch.full((1,), sigma), torch.tensor([3]))
        tokens = tokens + (following - sigma) * velocity
    cache_dit.summary(model)
    cache_dit.disable_cache(model)
    return tokens


def main(argv: list[str] | None = None) -> torch.Tensor:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--kernels", action="store_true")
    p.add_argument("--own", action="store_true")
    args = p.parse_args(argv)
    if not args.own:
        (backend.accelerate if args.kernels else backend.install)()  # the line
    try:
        return generate(load_model(), args.steps)
    finally:
        backend.uninstall()


if __name__ == "__main__":
    main()
