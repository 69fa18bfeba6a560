# SPDX-License-Identifier: Apache-2.0
"""The operators that a reused step of cache-dit runs beside the model's own, called bare: one after the other, by
nobody's bookkeeping. What a step takes beyond its model and these is Python.

They follow the first block of a model that has no other, so that they find the processor as a reused step does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcache.ops.dispatch import at_once
from fastcache.ops.short import factors, held_change, held_sum

from .overhead import flux

Operators = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CPU = torch.device("cpu")


def none(x: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing between the block and what follows."""
    return text, image


def theirs(order: int) -> Operators:
    """cache-dit's own. order: of its Taylor forecast, 0 for plain reuse."""
    before, image_terms, text_terms = held(order)

    def forecast(terms: list[Tensor]) -> Any:
        if not order:
            return terms[0]
        output: Any = 0
        for i, term in enumerate(terms):
            output += 0.5 * term * 2**i
        return output

    def run(x: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        now = image - x.to(image.device)
        ((before - now).abs().mean() / before.abs().mean()).item()
        return forecast(text_terms) + text, forecast(image_terms) + image

    return run


def accelerated(order: int) -> Operators:
    """Those under `accelerate()`."""
    before, image_terms, text_terms = held(order)
    (change, code), add = known("residual_l1"), sum_of(order)

    def run(x: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image - x.to(image.device)
        sums = torch.empty(2, dtype=torch.float32, device=CPU)
        places = held_change(code, image.numel(), 1, sums.data_ptr(), before.data_ptr())
        change(places, image.data_ptr(), x.data_ptr())
        sums.tolist()
        return add(text, text_terms), add(image, image_terms)

    return run


def installed(order: int) -> Operators:
    """Those under `install()`, which keeps no text that the model does not read, and packs addresses once."""
    before, terms, _ = held(order)
    (change, code), (combine, _) = known("residual_l1"), known("linear_combine")
    places = held_change(code, before.numel(), 1, 0, before.data_ptr())
    count, addresses = 1 + len(terms), [t.data_ptr() for t in terms]
    added = held_sum[count](code, before.numel(), count, *addresses)
    weights = [1.0, *[0.5] * len(terms)]

    def run(x: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        change(places, image.data_ptr(), x.data_ptr())
        if not order:
            return text, image + terms[0]
        out = torch.empty_like(image)
        combine(added, factors[count](*weights), out.data_ptr(), image.data_ptr())
        return text, out

    return run


def held(order: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What a run keeps: the first block's residual, and the terms of what is added to image and to text."""
    image, text = (1, 16, 32), (1, 8, 32)
    terms = [[torch.randn(shape) for _ in range(order + 1)] for shape in (image, text)]
    return torch.randn(image), terms[0], terms[1]


def known(op: str) -> tuple[Callable[..., Any], int]:
    """What the runtime calls for an op, once it has looked at the tensors, and the number of their dtype there."""
    kernel = at_once(op, torch.float32)
    if kernel is None:
        raise RuntimeError("the C++ kernels do not work here, and they are what is measured")
    return kernel


def sum_of(order: int) -> Callable[[Tensor, list[Tensor]], Tensor]:
    kernel, code = known("linear_combine")

    def combined(base: Tensor, terms: list[Tensor]) -> Tensor:
        out, count = torch.empty_like(base), 1 + len(terms)
        places = held_sum[count](code, base.numel(), count, *[t.data_ptr() for t in terms])
        weights = factors[count](1.0, *[0.5] * len(terms))
        kernel(places, weights, out.data_ptr(), base.data_ptr())
        return out

    return combined if order else lambda base, terms: base + terms[0]


def followed(operators: Operators) -> Any:
    """FLUX with one block, which these operators follow."""
    model = flux(1, 0)
    block: Any = model.transformer_blocks[0]
    forward = block.forward

    def run(
        hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        text, image = forward(
            hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **rest
        )
        return operators(hidden_states, image, text)

    block.forward = run
    return model
