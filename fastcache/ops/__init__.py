# SPDX-License-Identifier: Apache-2.0
"""The ops by name: checked, on whatever device and backend the tensors call for."""

from . import exponential  # noqa: F401 - registers an internal op
from .combine import guidance_combine, linear_combine, taylor_update_
from .guided import guided_weights
from .modulated import modulated_l1
from .quantized import quantize_store, quantized_combine
from .registry import direct
from .residual import residual_apply, residual_l1, residual_magnitude, residual_store

__all__ = [
    "direct",
    "guidance_combine",
    "guided_weights",
    "linear_combine",
    "modulated_l1",
    "quantize_store",
    "quantized_combine",
    "residual_apply",
    "residual_l1",
    "residual_magnitude",
    "residual_store",
    "taylor_update_",
]
