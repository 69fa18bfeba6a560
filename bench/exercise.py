# SPDX-License-Identifier: Apache-2.0
"""Run every op once per backend, dtype and awkward shape: what compute-sanitizer looks at."""

from __future__ import annotations

import torch

import fastcache
from fastcache.ops import dispatch

from .chains import OPS

SHAPES = ((33, 96), (7, 100), (257, 3072))


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ran = 0
    for backend in ("cpp", "triton", "cuda"):
        if dispatch.status(backend) is not True or not dispatch.BACKENDS[backend].reads(device):
            continue
        for op in OPS:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for shape in SHAPES:
                    buffers = {
                        name: torch.randn(shape, device=device).to(dtype)
                        for name in op.tensors.split()
                    }
                    with fastcache.backend(backend):
                        op.ours(buffers)
                    ran += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} calls on {device}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
