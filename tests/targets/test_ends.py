# SPDX-License-Identifier: Apache-2.0
"""Stack(first, last): blocks at both ends that always run, and what is between them skipped."""

from __future__ import annotations

import pytest
import torch
import toys
from ends import ENDS, LONG, MASK, SHAPES, THRESHOLD, TWO, close, driven, expected
from torch import Tensor

import fastcache
from fastcache import (
    DMD,
    Chebyshev,
    FirstBlock,
    Hermite,
    Mask,
    Recipe,
    Reuse,
    Stack,
    Taylor,
)
from fastcache.policies import Policy
from fastcache.targets.stack.layout import spread


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("first", "last"), ENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_at_the_ends_run_and_those_between_are_forecast(shape, first, last):
    given, text = SHAPES[shape]
    model, calls = toys.Model(**given), toys.inputs(text=text)
    wanted, _ = expected(model, calls, first, last, Taylor(1))
    recipe = Recipe(Mask(MASK), Taylor(1), Stack(first, last))
    with fastcache.enable(model, recipe) as cache:
        close(driven(cache, model, calls), wanted)
        assert toys.actions(cache) == "".join("C" if m else "." for m in MASK)


@pytest.mark.parametrize(("first", "last"), [e for e in ENDS if e[0]])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_change_is_that_of_what_the_first_blocks_add(shape, first, last):
    given, text = SHAPES[shape]
    model, calls = toys.Model(**given), toys.inputs(text=text)
    wanted, marks = expected(model, calls, first, last, Reuse(), THRESHOLD)
    assert {"C", "."} == set(marks)
    with fastcache.enable(
        model, Recipe(FirstBlock(THRESHOLD), Reuse(), Stack(first, last))
    ) as cache:
        close(driven(cache, model, calls), wanted)
        assert toys.actions(cache) == marks


@pytest.mark.parametrize(
    ("shape", "first", "last", "threshold"),
    [
        ("tensor", 0, 2, None),
        ("tensor", 2, 1, THRESHOLD),
        ("in place", 2, 1, THRESHOLD),
        ("by index", 2, 0, THRESHOLD),
        ("(hidden, encoder)", 2, 1, THRESHOLD),
        ("positional", 2, 1, None),
        ("two lists", 4, 1, THRESHOLD),
        ("two lists of two streams", 4, 1, THRESHOLD),
        ("two lists of two streams", 1, 4, None),
    ],
)
def test_compiled_steps_run_the_same_blocks(shape, first, last, threshold):
    given, text = SHAPES[shape]
    model, calls = toys.Model(**given), toys.inputs(text=text)
    what = Reuse() if threshold else Taylor(1)
    wanted, marks = expected(model, calls, first, last, what, threshold)
    when: Policy = Mask(MASK) if threshold is None else FirstBlock(threshold)
    with fastcache.enable(model, Recipe(when, what, Stack(first, last))) as cache:
        compiled = fastcache.compile(model, backend="aot_eager")
        close(driven(cache, compiled, calls), wanted)
        assert toys.actions(cache) == marks


def test_zero_is_what_it_was():
    model, calls = toys.Model(depth=4), toys.inputs()
    found = []
    for where in (Stack(), Stack(1)):
        with fastcache.enable(model, Recipe(FirstBlock(THRESHOLD), Reuse(), where)) as cache:
            found.append((driven(cache, model, calls), toys.actions(cache)))
    assert all(map(torch.equal, found[0][0], found[1][0])) and found[0][1] == found[1][1]


def test_blocks_between_do_not_run_on_a_reused_step():
    model, calls = toys.Model(**TWO), toys.inputs()
    ran: list[int] = []
    for i, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack(2, 1))) as cache:
        for i, call in enumerate(calls):
            ran.clear()
            with cache.context("cond", step_index=i, num_inference_steps=len(calls)):
                toys.step(model, call)
            assert ran == (list(range(6)) if MASK[i] else [0, 1, 5])


@pytest.mark.parametrize(
    ("counts", "first", "last", "found"),
    [
        ((5,), 0, 0, [(0, 0)]),
        ((5,), 2, 1, [(2, 1)]),
        ((3, 3), 4, 1, [(3, 0), (1, 1)]),
        ((3, 3), 1, 4, [(1, 1), (0, 3)]),
        ((2, 2, 2), 2, 3, [(2, 0), (0, 1), (0, 2)]),
    ],
)
def test_ends_are_counted_over_all_lists(counts, first, last, found):
    assert spread(counts, first, last) == found


@pytest.mark.parametrize(("first", "last"), [(6, 0), (0, 6), (3, 3), (5, 4)])
def test_something_has_to_be_left_to_skip(first, last):
    model = toys.Model(**TWO)
    with pytest.raises(ValueError, match="leaves none"):
        fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack(first, last)))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("given", [{"first": -1}, {"last": 1.5}, {"first": "2"}])
def test_counts_are_checked(given):
    with pytest.raises((ValueError, TypeError), match=next(iter(given))):
        Stack(**given)


class TakesTurns(toys.Model):
    def _blocks(self):
        for pair in zip(*(getattr(self, name) for name in self.lists), strict=True):
            yield from pair


def test_lists_that_take_turns_cannot_be_counted():
    model = TakesTurns(**TWO)
    with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack(2, 1))):
        with pytest.raises(ValueError, match="runs them in another order"):
            toys.step(model, toys.inputs()[0])


@pytest.mark.parametrize(
    "what",
    [Taylor(2), Hermite(2), Chebyshev(2), DMD()],
    ids=lambda p: type(p).__name__,
)
def test_every_predictor_goes_with_ends(what):
    """The step with blocks at the ends equals that of a model which has only those between."""
    model, calls = toys.Model(**LONG), toys.inputs(14)
    mask = Mask((1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0))
    entered: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda *a: entered.append(a[-1].clone()))
    with fastcache.enable(model, Recipe(mask, what, Stack(2, 1))) as cache:
        found = driven(cache, model, calls)

    class Between(torch.nn.Module):
        """The blocks between, as a model of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = model.blocks[2:5]

        def forward(self, hidden_states, timestep=None):
            for block in self.blocks:
                hidden_states = block(hidden_states=hidden_states)
            return hidden_states

    inner = Between()
    with fastcache.enable(inner, Recipe(mask, what, Stack())) as cache:
        for i, (hidden, call) in enumerate(zip(entered, calls, strict=True)):
            with cache.context("cond", step_index=i, num_inference_steps=len(calls)):
                between = toys.step(inner, {"hidden_states": hidden, "timestep": call["timestep"]})
            close([found[i]], [model.proj_out(model.blocks[5](hidden_states=between))])


@pytest.mark.parametrize("at", [0, 5])
def test_a_block_that_always_runs_may_be_exchanged_in_mid_run(at):
    """It is the new one that runs from the next step on, whatever that step was going to be."""
    model, calls = toys.Model(**LONG), toys.inputs()
    other = toys.Model(**LONG, seed=1)
    ran: list[int] = []
    other.blocks[at].register_forward_hook(lambda *_: ran.append(1))
    with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack(1, 1))) as cache:
        driven_to = calls[:2]
        driven(cache, model, driven_to)
        model.blocks._modules[str(at)] = other.blocks[at]
        with cache.context("cond", step_index=2, num_inference_steps=len(calls)):
            toys.step(model, calls[2])
        assert ran == [1]


@pytest.mark.parametrize("first", [1, 3])
def test_a_computed_step_that_leaves_out_a_block_of_the_head_stores_nothing(first):
    class Leaves(toys.Model):
        skip = None

        def _blocks(self):
            for i, block in enumerate(self.blocks):
                if i != self.skip:
                    yield block

    model, calls = Leaves(**LONG), toys.inputs()
    with fastcache.enable(model, Recipe(FirstBlock(1e9), Reuse(), Stack(first, 1))) as cache:
        for i, call in enumerate(calls[:4]):
            model.skip = 1 if i == 1 else None
            with cache.context("cond", step_index=i, compute=i == 1):
                found = toys.step(model, call)
        assert toys.actions(cache) == "CCC."
    model.skip = None
    assert not torch.equal(found, toys.step(model, calls[3]))
