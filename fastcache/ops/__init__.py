"""The ops by name: checked, on whatever device and backend the tensors call for."""

from .registry import (
    direct,
    guidance_combine,
    guided_weights,
    linear_combine,
    quantize_store,
    quantized_combine,
    residual_apply,
    residual_l1,
    residual_magnitude,
    residual_store,
    taylor_update_,
)

__all__ = [
    "direct",
    "guidance_combine",
    "guided_weights",
    "linear_combine",
    "quantize_store",
    "quantized_combine",
    "residual_apply",
    "residual_l1",
    "residual_magnitude",
    "residual_store",
    "taylor_update_",
]
