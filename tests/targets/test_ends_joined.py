# SPDX-License-Identifier: Apache-2.0
"""Stack(first, last) where lists join their streams, where a guide looks, and where a signal is before the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from ends import MASK, TWO, close, driven
from torch import Tensor

import fastcache
from fastcache import (
    BlockAdapter,
    Chebyshev,
    FirstBlock,
    Guided,
    Mask,
    Recipe,
    Reuse,
    Stack,
)
from fastcache.policies import Decision, Policy
from fastcache.signals import Signal


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    torch._dynamo.reset()


class Joined(toys.Model):
    """Two streams, then both joined in one list, as FLUX has it."""

    def __init__(self) -> None:
        super().__init__(block=toys.Dual, lists=("transformer_blocks",), depth=3, streams="he")
        torch.manual_seed(1)
        self.single_transformer_blocks = torch.nn.ModuleList(toys.Block() for _ in range(3))
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Any = None, encoder_hidden_states=None):
        hidden = self.embed(hidden_states)
        hidden = hidden + 0.1 * torch.sin(timestep / 300).reshape(-1, 1, 1)
        text = encoder_hidden_states
        for block in self.transformer_blocks:
            hidden, text = block(hidden_states=hidden, encoder_hidden_states=text)
        both = torch.cat([text, hidden], 1)
        for block in self.single_transformer_blocks:
            both = block(hidden_states=both)
        return self.proj_out(both[:, text.shape[1] :])


def joined(model: Joined, calls: list, first: int, last: int, threshold: float | None):
    """The same for `Joined`, streams always joined between the lists."""
    kept, outputs, marks, seen = None, [], "", None
    for step, call in enumerate(calls):
        text, x = call["encoder_hidden_states"], model.embed(call["hidden_states"])
        x = x + 0.1 * torch.sin(call["timestep"] / 300).reshape(-1, 1, 1)
        state = torch.cat([text, x], 1)
        length = text.shape[1]

        def run(at: int, state: Tensor, length: int = length) -> Tensor:
            if at >= 3:
                return model.single_transformer_blocks[at - 3](hidden_states=state)
            h, t = model.transformer_blocks[at](
                hidden_states=state[:, length:], encoder_hidden_states=state[:, :length]
            )
            return torch.cat([t, h], 1)

        for at in range(first):
            state = run(at, state)
        now = (state - torch.cat([text, x], 1))[:, length:]
        change = None if seen is None else (now - seen).abs().sum() / seen.abs().sum()
        compute = bool(MASK[step])
        if threshold is not None:
            compute = change is None or not float(change) <= threshold
        marks += "C" if compute else "."
        if compute:
            seen, before = now, state
            for at in range(first, 6 - last):
                state = run(at, state)
            kept = state - before
        else:
            state = state + kept
        for at in range(6 - last, 6):
            state = run(at, state)
        outputs.append(model.proj_out(state[:, length:]))
    return outputs, marks


@pytest.mark.parametrize(
    ("first", "last", "threshold", "way"),
    [
        *(
            (*ends, threshold, "eager")
            for ends in [(1, 0), (1, 2), (1, 4), (2, 3), (3, 0), (3, 1), (4, 0), (4, 1)]
            for threshold in (None, 0.08)
        ),
        (1, 2, 0.08, "fastcache.compile"),
        (4, 1, 0.08, "fastcache.compile"),
        (1, 4, None, "fastcache.compile"),
    ],
)
def test_lists_that_join_the_text_are_counted_as_one(first, last, threshold, way):
    model, calls = Joined(), toys.inputs(text=True)
    wanted, marks = joined(model, calls, first, last, threshold)
    assert {"C", "."} == set(marks)
    when: Policy = Mask(MASK) if threshold is None else FirstBlock(threshold)
    with fastcache.enable(model, Recipe(when, Reuse(), Stack(first, last))) as cache:
        driver = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
        close(driven(cache, driver, calls), wanted)
        assert toys.actions(cache) == marks


@pytest.mark.parametrize(
    ("guide", "way"),
    [("residual", "eager"), ("input", "eager"), ("residual", "fastcache.compile")],
)
def test_a_guide_sees_the_head_or_what_enters_it(guide, way):
    """Where what the guide sees is linear in the steps, so are the weights that explain it."""
    model, calls = toys.Model(depth=5), toys.inputs()
    outputs = []
    for where in (Stack(), Stack(1, 0)):
        with fastcache.enable(model, Recipe(Mask(MASK), Guided(1, guide=guide), where)) as cache:
            driver = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
            outputs.append(driven(cache, driver, calls))
    if guide == "residual":
        close(*outputs)
    with fastcache.enable(model, Recipe(Mask(MASK), Guided(1, guide=guide), Stack(2, 1))) as cache:
        driver = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
        found = driven(cache, driver, calls)
    plain = toys.plain(model, calls)
    for i, (a, b) in enumerate(zip(found, plain, strict=True)):
        assert torch.equal(a, b) == bool(MASK[i]) or way != "eager"
        assert (a - b).abs().max() < 0.5 * b.abs().max()


class Moved(Policy):
    """Reuses while what enters the first block has changed little."""

    threshold = 0.12
    signal = Signal("block_input", against="previous")

    def _judge(self, run, step, signal, guard):
        reuse = not guard and signal is not None and signal <= self.threshold
        return Decision("reuse" if reuse else "compute", signal, self.threshold, guard or "moved")


class Normed(toys.Block):
    """A block with a normalisation that is modulated by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = _Norm()

    def forward(self, hidden_states: Tensor, temb: Any = None) -> Tensor:
        return hidden_states + self.change(self.norm1(hidden_states, temb=temb))


class _Norm(torch.nn.Module):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:]) * (1 + temb)


class Timed(toys.Model):
    def _call(self, block, hidden, text):
        return block(hidden_states=hidden, temb=self.now)

    def forward(self, hidden_states, timestep=None):
        self.now = torch.sin(timestep / 300).reshape(-1, 1, 1)
        return super().forward(hidden_states, timestep)


def test_a_signal_before_the_first_block_stays_there():
    block = fastcache.Block(modulation=("norm1", "temb", "temb"))
    seen = []
    for where in (Stack(), Stack(2, 1)):
        model, calls = Timed(block=Normed, depth=5), toys.inputs()
        recipe = Recipe(Moved(), Reuse(), where)
        with fastcache.enable(model, recipe, adapter=BlockAdapter(block=block)) as cache:
            driven(cache, model, calls)
            seen.append([(r.action, r.signal) for r in cache.stats])
    assert seen[0] == seen[1] and {a for a, _ in seen[0]} == {"compute", "reuse"}


def test_a_head_that_ends_where_the_text_is_lost_is_refused():
    class Loses(Joined):
        def __init__(self) -> None:
            super().__init__()
            self.single_transformer_blocks = torch.nn.ModuleList(toys.Optional() for _ in range(3))

        def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
            hidden, text = self.embed(hidden_states), encoder_hidden_states
            for block in self.transformer_blocks:
                hidden, text = block(hidden_states=hidden, encoder_hidden_states=text)
            for block in self.single_transformer_blocks:
                hidden = block(hidden_states=hidden, encoder_hidden_states=text)
            return self.proj_out(hidden)

    model = Loses()
    with fastcache.enable(model, Recipe(FirstBlock(0.1), Reuse(), Stack(4))):
        with pytest.raises(ValueError, match="give first at most 3"):
            toys.step(model, toys.inputs(text=True)[0])


class Counts(toys.Model):
    """Its loop does by number what it does to a block, and hands the output of early blocks to late ones."""

    def through(self, hidden, text):
        skips = []
        for i, block in enumerate(self.blocks):
            late = i >= len(self.blocks) // 2
            hidden = block(hidden_states=hidden, scale=0.2 * (i + 1) + (skips.pop() if late else 0))
            skips.append(0.1 * hidden.mean())
        return hidden, text


@pytest.mark.parametrize("way", ["eager", "fastcache.compile"])
@pytest.mark.parametrize("ends", [(1, 1), (2, 2), (0, 1)])
def test_blocks_behind_the_segment_keep_their_number(ends, way):
    """What stands still is what the model gives, whatever is skipped."""
    model, call = Counts(depth=6), toys.inputs(1)[0]
    (wanted,) = toys.plain(model, [call])
    with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack(*ends))) as cache:
        run = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
        close(driven(cache, run, [call] * len(MASK)), [wanted] * len(MASK))
        assert toys.actions(cache) == "".join("C" if m else "." for m in MASK)


def test_what_was_cut_anew_counts_its_steps_anew():
    """A loop that does more between its lists is seen to in the first call, which stores nothing."""

    class Between(toys.Model):
        def through(self, hidden, text):
            for block in self.transformer_blocks:
                hidden = block(hidden_states=hidden)
            for block in self.single_transformer_blocks:
                hidden = block(hidden_states=hidden) * 1.0
            return hidden, text

    model, calls = Between(**TWO), toys.inputs(8)
    recipe = Recipe(Mask((1, 1, 0, 1, 0, 1, 0, 0)), Chebyshev(1))
    with fastcache.enable(model, recipe) as cache:
        driven(cache, model, calls)
        assert toys.actions(cache) == "CC.C.C.."


class Flat(toys.Dual):
    """Streams of [tokens, width], as Cosmos 3 has them."""

    def forward(self, hidden_states, encoder_hidden_states, temb=None):
        hidden, text = self.both(hidden_states[None], encoder_hidden_states[None])
        return hidden[0], text[0]


def test_a_step_in_two_parts_finds_the_text_of_streams_without_a_batch():
    class Cosmos(toys.Model):
        def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
            hidden, text = self.embed(hidden_states[0]), encoder_hidden_states[0]
            hidden = hidden[:2] + 0.1 * torch.sin(
                timestep[0] / 300
            )  # two tokens, and three of text
            hidden, text = self.through(hidden, text)
            return self.proj_out(hidden + text.mean(0))[None]

    model, calls = Cosmos(block=Flat, depth=4, streams="he"), toys.inputs(text=True)
    found = []
    for way in ("eager", "compiled"):
        with fastcache.enable(model, Recipe(FirstBlock(0.1), Reuse())) as cache:
            run = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
            found.append((driven(cache, run, calls), toys.actions(cache)))
    assert found[0][1] == found[1][1] and set(found[0][1]) == {"C", "."}
    close(found[1][0], found[0][0])
