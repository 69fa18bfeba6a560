# SPDX-License-Identifier: Apache-2.0
"""Models whose first and last blocks always run, and what their steps give, written down plainly."""

from __future__ import annotations

from typing import Any

import torch
import toys
from torch import Tensor

import fastcache

MASK = (1, 1, 0, 0, 1, 0, 1, 1, 0, 1)
THRESHOLD = 0.12
LONG = {"depth": 6}
TWO = {"lists": ("transformer_blocks", "single_transformer_blocks")}
SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "tensor": (LONG, False),
    "in place": ({**LONG, "block": toys.InPlace}, False),
    "by index": ({**LONG, "walk": "index"}, False),
    "sliced": ({**LONG, "walk": "slices"}, False),
    "listed first": ({**LONG, "walk": "listed"}, False),
    "(hidden, encoder)": ({**LONG, "block": toys.Dual, "streams": "he"}, True),
    "positional": ({**LONG, "block": toys.Turned, "streams": "eh", "style": "positional"}, True),
    "extra returns": ({**LONG, "block": toys.Extra, "streams": "he"}, True),
    "two lists": (TWO, False),
    "two lists in place": ({**TWO, "block": toys.InPlace}, False),
    "two lists of two streams": ({**TWO, "block": toys.Turned, "streams": "eh"}, True),
    "three lists": ({"lists": ("blocks", "layers", "transformer_blocks"), "depth": 2}, False),
}  # fmt: skip
ENDS = [(0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 2), (4, 1), (5, 0), (1, 4)]


def parts(model: toys.Model, call: dict) -> tuple[list, Tensor, Any]:
    """The blocks of a toy as one list, and what enters the first of them."""
    hidden = model.embed(call["hidden_states"])
    t = call["timestep"].reshape(-1, 1, 1)
    blocks = [block for name in model.lists for block in getattr(model, name)]
    return blocks, hidden + 0.1 * torch.sin(t / 300), call.get("encoder_hidden_states")


def through(model: toys.Model, blocks: list, hidden: Tensor, text: Any) -> tuple[Tensor, Any]:
    for block in blocks:
        out = model._call(block, hidden.clone(), text)
        if model.streams == "h":
            hidden = out
        elif model.streams == "eh":
            text, hidden = out
        else:
            hidden, text = out[:2]
    return hidden, text


def expected(
    model: toys.Model, calls: list, first: int, last: int, what: Any, threshold: float | None = None
) -> tuple[list[Tensor], str]:
    """The outputs and the actions, written down plainly."""
    kept: list[tuple[int, Tensor, Any]] = []
    outputs, marks, seen = [], "", None
    for step, call in enumerate(calls):
        blocks, x, text = parts(model, call)
        stop = len(blocks) - last
        hidden, text = through(model, blocks[:first], x, text)
        if threshold is None:
            compute = bool(MASK[step])
        else:
            now = hidden - x
            change = None if seen is None else (now - seen).abs().sum() / seen.abs().sum()
            compute = change is None or not float(change) <= threshold
            seen = now if compute else seen
        marks += "C" if compute else "."
        if compute:
            after, words = through(model, blocks[first:stop], hidden, text)
            kept.insert(0, (step, after - hidden, None if text is None else words - text))
            hidden, text = after, words
        else:
            held = kept[: what.depth]
            weights = what.weights(tuple(s for s, *_ in held), step)
            terms = list(zip(weights, held, strict=False))
            hidden = hidden + sum(w * r for w, (_, r, _) in terms)
            text = None if text is None else text + sum(w * r for w, (_, _, r) in terms)
        hidden, text = through(model, blocks[stop:], hidden, text)
        if text is not None:
            hidden = hidden + 0.5 * text.mean(1, keepdim=True)
        outputs.append(model.proj_out(hidden))
    return outputs, marks


def driven(cache: fastcache.Cache, model: Any, calls: list) -> list[Tensor]:
    found = []
    for i, call in enumerate(calls):
        with cache.context("cond", step_index=i, num_inference_steps=len(calls)):
            found.append(toys.step(model, call))
    return found


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"step {i}: {m}")
