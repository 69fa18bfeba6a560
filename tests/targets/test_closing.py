# SPDX-License-Identifier: Apache-2.0
"""A residual that reaches over the normalisation behind the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from ends import MASK, close, parts, through
from modulated import WAYS
from torch import nn

import fastcache
from fastcache import BlockAdapter, FirstBlock, Mask, Recipe, Reuse, Stack, Taylor

ADAPTER = BlockAdapter(norm="last.norm")
SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "tensor": ({}, False),
    "one block": ({"depth": 1}, False),
    "by index": ({"walk": "index"}, False),
    "in place": ({"block": toys.InPlace}, False),
    "(encoder, hidden), positional": (
        {"block": toys.Turned, "streams": "eh", "style": "positional"},
        True,
    ),
    "extra returns": ({"block": toys.Extra, "streams": "he"}, True),
    "two lists": ({"lists": ("transformer_blocks", "single_transformer_blocks")}, False),
}


@pytest.fixture(autouse=True)
def compiled_anew():
    """Graphs of other tests count against the recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Normed(toys.Model):
    """Puts the image stream through a normalisation of its own behind the blocks."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.last = nn.ModuleDict({"norm": nn.LayerNorm(toys.DIM)})
        nn.init.normal_(self.last["norm"].weight)
        self.eval().requires_grad_(False)

    def through(self, hidden, text):
        hidden, text = super().through(hidden, text)
        return self.last["norm"](hidden), text


def expected(model: Normed, calls: list, what: Any) -> list:
    """The outputs, written down plainly."""
    outputs, kept = [], []
    for step, call in enumerate(calls):
        blocks, x, text = parts(model, call)
        if MASK[step]:
            hidden, words = through(model, blocks, x, text)
            after = model.last["norm"](hidden)
            kept.insert(0, (step, after - x, None if text is None else words - text))
        else:
            held = kept[: what.depth]
            weights = what.weights(tuple(s for s, *_ in held), step)
            terms = list(zip(weights, held, strict=False))
            after = x + sum(w * residual for w, (_, residual, _) in terms)
            words = None if text is None else text + sum(w * r for w, (*_, r) in terms)
        if "e" in model.streams and words is not None:
            after = after + 0.5 * words.mean(1, keepdim=True)
        outputs.append(model.proj_out(after))
    return outputs


@pytest.mark.parametrize(
    ("shape", "way"),
    [*((shape, "eager") for shape in SHAPES), ("tensor", "compiled"), ("tensor", "frozen")],
)
def test_the_normalisation_belongs_to_what_is_skipped(shape, way):
    given, text = SHAPES[shape]
    model, what = Normed(**given), Taylor(1)
    calls = toys.inputs(text=text)
    wanted = expected(model, calls, what)
    ran: list[int] = []
    model.last["norm"].register_forward_hook(lambda *_: ran.append(1))
    where = Stack(normed=True)
    with fastcache.enable(model, Recipe(Mask(MASK), what, where), adapter=ADAPTER) as cache:
        call_model = WAYS[way](model)
        close(toys.run(cache, call_model, calls), wanted)
        assert toys.actions(cache) == "".join("C" if m else "." for m in MASK)
        if way == "eager":
            assert len(ran) == sum(MASK)  # once per computed step, by a user's hook too
    assert type(model.last["norm"]) is nn.LayerNorm and len(model.last["norm"].__dict__) == len(
        nn.LayerNorm(1).__dict__
    )
    close(toys.plain(model, calls[:1]), wanted[:1])


@pytest.mark.parametrize("way", WAYS)
def test_a_rule_that_looks_at_the_first_block_decides_as_ever(way):
    model, calls = Normed(), toys.inputs()
    found = {}
    for normed in (False, True):
        recipe = Recipe(FirstBlock(0.12), Reuse(), Stack(normed=normed))
        with fastcache.enable(model, recipe, adapter=ADAPTER) as cache:
            outputs = toys.run(cache, WAYS[way](model), calls)
            found[normed] = toys.actions(cache), outputs
    marks = found[True][0]
    assert found[False][0] == marks and {"C", "."} <= set(marks)
    for mark, plain, normed in zip(marks, found[False][1], found[True][1], strict=True):
        assert torch.allclose(plain, normed, atol=1e-5) == (mark == "C")


def test_models_without_one_are_cached_as_ever():
    calls = toys.inputs()
    with fastcache.enable(toys.model(), Recipe(Mask(MASK), Reuse(), Stack(normed=True))) as cache:
        found = toys.run(cache, cache.target, calls)
    with fastcache.enable(toys.model(), Recipe(Mask(MASK), Reuse(), Stack())) as cache:
        close(toys.run(cache, cache.target, calls), found)


def test_a_module_that_is_not_there_or_not_called_is_refused():
    recipe, (call, *_) = Recipe(Mask(MASK), Reuse(), Stack(normed=True)), toys.inputs(1)
    with pytest.raises(ValueError, match="norm is 'final', and Normed has no such module"):
        fastcache.enable(Normed(), recipe, adapter=BlockAdapter(norm="final"))
    for given, norm in (({}, "last"), ({"lists": ("blocks", "layers")}, "last.norm")):
        model = Normed(**given)
        lists = ("layers", "blocks") if given else None
        where = BlockAdapter(norm=norm, blocks=lists)
        if not given:
            model.last.forward = lambda x: x  # nobody calls it
        with fastcache.enable(model, recipe, adapter=where):
            with pytest.raises(ValueError, match="does not put what its last block"):
                toys.step(model, call)
