# SPDX-License-Identifier: Apache-2.0
"""What a cache will take, from the shapes of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.adapter import ENCODER
from ..models.table import BLOCKS
from ..recipe import Rule
from ..runtime.denoiser import Denoiser
from ..targets.guidance import GuidanceTarget
from ..targets.modules import ModulesTarget
from ..targets.output import OutputTarget
from ..targets.stack.target import StackTarget


@dataclass(frozen=True)
class Shapes:
    """Sizes of the hidden states [batch, tokens, width] that a model will be run with.

    Args:
        tokens, text_tokens: length of the image and of the text sequence.
        width: features of a token; None reads it off the linear layers.
        batch: samples per call.
        dtype: name of a torch dtype.
        contexts: branches with a history of their own, 2 for sequential guidance.
    """

    tokens: int = 4096
    text_tokens: int = 512
    width: int | None = None
    batch: int = 1
    dtype: str = "bfloat16"
    contexts: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize


def stream_width(denoiser: Denoiser) -> int:
    """Features of a token: the commonest input width of the linear layers."""
    widths = Counter(m.in_features for m in denoiser.model.modules() if isinstance(m, nn.Linear))
    return widths.most_common(1)[0][0] if widths else 1


def weight_bytes(denoiser: Denoiser, rule: Rule, target: Any, shapes: Shapes) -> int:
    """Bytes that one rule holds for one context of an eager model.

    Compiled graphs in two parts keep the first block's output too.
    """
    known = HELD.get(rule.where.scope)
    return target.bytes_for(shapes) if known is None else known(denoiser, rule, target, shapes)


def _modules_bytes(denoiser: Denoiser, rule: Rule, target: ModulesTarget, shapes: Shapes) -> int:
    dtype = rule.what.dtype
    itemsize = dtype.itemsize if dtype is not None else shapes.itemsize
    elements = sum(
        _elements(node.module, shapes, _joined(denoiser.model, node.name)) for node in target.nodes
    )
    return rule.what.depth * elements * itemsize


def _guidance_bytes(denoiser: Denoiser, rule: Rule, target: GuidanceTarget, shapes: Shapes) -> int:
    """Two bands of half the batch, kept in float32."""
    return 2 * 4 * shapes.batch // 2 * shapes.tokens * _channels(denoiser, shapes)


def _output_bytes(denoiser: Denoiser, rule: Rule, target: OutputTarget, shapes: Shapes) -> int:
    """As many outputs as the predictor keeps."""
    elements = shapes.batch * shapes.tokens * _channels(denoiser, shapes)
    return rule.what.depth * elements * shapes.itemsize


def _channels(denoiser: Denoiser, shapes: Shapes) -> int:
    """Features of a token of the model's output."""
    output = next((m for n, m in denoiser.model.named_children() if n == "proj_out"), None)
    channels: int = getattr(output, "out_features", 0) or shapes.width or 1
    return channels


def _stack_bytes(denoiser: Denoiser, rule: Rule, target: StackTarget, shapes: Shapes) -> int:
    row = shapes.batch * (shapes.width or 1) * shapes.itemsize
    image, text = row * shapes.tokens, row * shapes.text_tokens
    last = target.lists[-1].last_io
    returned = last.returns is not None and ENCODER in last.returns
    texted = target.keeps_text and last.encoder_at is not None and returned
    held = rule.what.depth * (image + texted * text)
    if rule.when.decides_inside and rule.when.measures == "change":
        # the first block's residual; or its input, and as many zeros
        held += image if rule.when.runs_first_block else 2 * image
    if rule.what.guide is not None:
        # its history, and in float32 depth + 1 weights, one misfit, depth - 1 weights of the prior, and depth - 2 of
        # that of the newest value, where that is checked
        depth, thinned = rule.what.depth, -(-shapes.tokens // rule.what.tokens)
        held += depth * row * thinned + 4 * (depth + 1 + 1 + depth - 1)
        held += 4 * (depth - 2) * rule.what.checked
    return held


# Bytes by what a rule skips.
HELD: dict[str, Callable[[Denoiser, Rule, Any, Shapes], int]] = {
    "stack": _stack_bytes,
    "modules": _modules_bytes,
    "guidance": _guidance_bytes,
    "output": _output_bytes,
}


def _elements(module: nn.Module, shapes: Shapes, joined: bool) -> int:
    """Elements of what a module returns."""
    width = _out_features(module) or shapes.width or 1
    tokens = shapes.tokens + joined * shapes.text_tokens
    return shapes.batch * tokens * width


def _joined(model: nn.Module, name: str) -> bool:
    """Whether a module returns the text stream too: by itself, or since its block does."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        return False
    if getattr(module, "to_add_out", None) is not None:
        return True
    parents = name.split(".")
    blocks = [model.get_submodule(".".join(parents[:i])) for i in range(1, len(parents) + 1)]
    rows = [BLOCKS[c.__name__] for b in blocks for c in type(b).__mro__ if c.__name__ in BLOCKS]
    return any(ENCODER in (row.returns or ()) for row in rows)


def _out_features(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    out = getattr(module, "to_out", None)
    if isinstance(out, nn.ModuleList | nn.Sequential):
        out = next((m for m in out if isinstance(m, nn.Linear)), None)
    return getattr(out, "out_features", None)
