# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the cache arithmetic, with the names and signatures of `fastcache.reference`.

Arguments arrive checked (`fastcache.ops`): one shape and device, every tensor contiguous or a token
range of a contiguous [B, T, C]. Each tensor may have its own dtype among float32, float16 and
bfloat16; arithmetic is float32 and every output is rounded once. Each op is one launch. Importing
this package touches no device.

No kernel in this folder has run on a GPU yet: each is checked in Triton's interpreter, and compiled
ahead of time for sm_80, sm_90 and sm_100 (`python -m fastcache.triton_kernels.aot`).
"""

if __name__ != "fastcache.triton_kernels":
    raise ImportError(
        "this folder is fastcache.triton_kernels; OpenAI's `triton_kernels` is another package"
    )

from .exponential import exponential_solve
from .guided import guided_sums
from .linear_combine import (
    combine_samples,
    guidance_combine,
    linear_combine,
    residual_apply,
    residual_store,
)
from .modulated_l1 import modulated_l1
from .quantized import quantize_store, quantized_combine
from .residual_l1 import residual_l1
from .residual_magnitude import residual_magnitude
from .solve import guided_check, guided_solve
from .taylor import taylor_update

__all__ = [
    "combine_samples",
    "exponential_solve",
    "guidance_combine",
    "guided_check",
    "guided_solve",
    "guided_sums",
    "linear_combine",
    "modulated_l1",
    "quantize_store",
    "quantized_combine",
    "residual_apply",
    "residual_l1",
    "residual_magnitude",
    "residual_store",
    "taylor_update",
]
