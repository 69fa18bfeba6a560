"""The denoisers of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

DENOISERS = ("transformer", "transformer_2", "transformer_3", "unconditional_transformer")


def denoisers_of(target: Any) -> list[tuple[str, nn.Module]]:
    """The models to hook, each once, with their names; what torch.compile wrapped is unwrapped."""
    if isinstance(target, nn.Module):
        model = getattr(target, "_orig_mod", target)
        return [(type(model).__name__, model)]
    found: list[tuple[str, nn.Module]] = []
    for name in DENOISERS:
        model = getattr(target, name, None)
        model = getattr(model, "_orig_mod", model)
        if isinstance(model, nn.Module) and all(model is not m for _, m in found):
            found.append((name, model))
    if not found:
        raise TypeError(
            f"target is {type(target).__name__}, must be an nn.Module or a pipeline with a denoiser named one of "
            f"{DENOISERS}"
        )
    return found
