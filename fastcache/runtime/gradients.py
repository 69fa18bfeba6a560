# SPDX-License-Identifier: Apache-2.0
"""Gradients through a model with a cache: one that is asked for is computed, and a reused step has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils._pytree import tree_leaves, tree_map_only

ASKED_FOR = "an input requires a gradient"


def asked_for(args: tuple, kwargs: dict) -> bool:
    """Whether a call is to be differentiated by its inputs. For calls in grad mode.

    So it is where one of them requires a gradient, and inside transforms of torch.func, whose tensors storage
    could not outlive.
    """
    if any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves((args, kwargs))):
        return True
    if torch.compiler.is_compiling():
        return False
    return peek_interpreter_stack() is not None


def refuse_training(model: nn.Module) -> None:
    """Raise ValueError where a model is trained. For calls in grad mode."""
    if model.training and any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "target: the model is in training mode with gradients on; a cached step has no gradient. "
            "Call model.eval(), run under torch.no_grad(), or cache.disable() first"
        )


class Refused(torch.autograd.Function):
    """The value itself, through which no gradient comes."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "fastcache: this step was reused, so its output has no gradient; let an input require a gradient, "
            "then steps are computed, or call cache.disable() first"
        )


def has_gradient(output: Any) -> bool:
    """Whether a model's output can be differentiated."""
    return any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves(output))


def refusing(output: Any) -> Any:
    """A reused step's output, whose backward raises: a gradient by the parameters would lack those of the blocks."""

    def refused(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return Refused.apply(torch.zeros((), requires_grad=True), value)

    return tree_map_only(Tensor, refused, output)
