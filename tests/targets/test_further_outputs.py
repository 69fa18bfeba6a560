# SPDX-License-Identifier: Apache-2.0
"""Blocks that return more than their streams, and models that hand it on: nothing of it is lost, compiled or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from ends import MASK, THRESHOLD, close, driven
from torch import Tensor

import fastcache
from fastcache import BlockAdapter, FirstBlock, Mask, Recipe, Reuse, Stack
from fastcache.models.adapter import ENCODER, HIDDEN
from fastcache.policies import Policy


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    torch._dynamo.reset()


class Carrying(toys.Dual):
    """(hidden, text, audio, (what it weighed, a number)): the audio and the weights go on to the next block."""

    def forward(self, hidden_states, encoder_hidden_states, audio=None, more=None):  # type: ignore[override]
        hidden, text = self.both(hidden_states, encoder_hidden_states)
        hidden = hidden + 0.2 * audio.mean(1, keepdim=True)
        audio = audio + 0.3 * torch.tanh(self.ff(audio) + hidden.mean(1, keepdim=True))
        if more is not None:
            hidden = hidden + more[0][..., None] * more[1]
        return hidden, text, audio, (0.1 * hidden.mean(-1), 0.5)


class Carries(toys.Model):
    """A model with a third stream, as LTX 2 has its sound."""

    def __init__(self) -> None:
        super().__init__(block=Carrying, depth=5, streams="he")

    def run(self, blocks: Any, hidden: Tensor, text: Tensor, audio: Tensor, more: Any) -> tuple:
        for block in blocks:
            hidden, text, audio, more = block(
                hidden_states=hidden, encoder_hidden_states=text, audio=audio, more=more
            )
        return hidden, text, audio, more

    def enter(self, call: dict) -> tuple:
        hidden = self.embed(call["hidden_states"])
        wave = 0.1 * torch.sin(call["timestep"] / 300).reshape(-1, 1, 1)
        return hidden + wave, call["encoder_hidden_states"], hidden[:, :2] - wave, None

    def leave(self, hidden: Tensor, text: Tensor, audio: Tensor, more: Any) -> Tensor:
        seen = (text.mean(1) + audio.mean(1))[:, None] + more[0].mean() * more[1]
        return self.proj_out(hidden + 0.5 * seen)

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
        call = {
            "hidden_states": hidden_states,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
        }
        return self.leave(*self.run(self.blocks, *self.enter(call)))


def expected(model: Carries, calls: list, first: int, last: int, threshold: float | None):
    """Streams get their residual again, what else the blocks return is that of the last computed step."""
    blocks, stop = list(model.blocks), 5 - last
    kept, seen, outputs, marks = None, None, [], ""
    for step, call in enumerate(calls):
        start = model.enter(call)
        hidden, text, *more = model.run(blocks[:first], *start)
        compute = bool(MASK[step])
        if threshold is not None:
            now = hidden - start[0]
            change = None if seen is None else (now - seen).abs().sum() / seen.abs().sum()
            compute = change is None or not float(change) <= threshold
            seen = now if compute else seen
        marks += "C" if compute else "."
        if compute:
            after, words, *more = model.run(blocks[first:stop], hidden, text, *more)
            kept = after - hidden, words - text, more
            hidden, text = after, words
        else:
            hidden, text, more = hidden + kept[0], text + kept[1], kept[2]
        outputs.append(model.leave(*model.run(blocks[stop:], hidden, text, *more)))
    return outputs, marks


ENDS = [(1, 0, THRESHOLD), (1, 1, THRESHOLD), (2, 1, THRESHOLD), (0, 1, None), (2, 0, None)]


@pytest.mark.parametrize(
    ("first", "last", "threshold", "told", "way"),
    [(*ends, told, "eager") for ends in ENDS for told in (False, True)]
    + [(*ENDS[at], told, "fastcache.compile") for at, told in ((0, False), (2, True), (3, False))],
)
def test_further_outputs_go_on_from_each_part_of_a_step(first, last, threshold, told, way):
    model, calls = Carries(), toys.inputs(text=True)
    row = fastcache.Block(returns=(HIDDEN, ENCODER)) if told else None
    wanted, marks = expected(model, calls, first, last, threshold)
    assert {"C", "."} == set(marks)
    when: Policy = Mask(MASK) if threshold is None else FirstBlock(threshold)
    recipe = Recipe(when, Reuse(), Stack(first, last))
    with fastcache.enable(model, recipe, adapter=BlockAdapter(block=row)) as cache:
        run = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
        close(driven(cache, run, calls), wanted)
        assert toys.actions(cache) == marks


def test_they_are_allocated_once_and_counted():
    model, calls = Carries(), toys.inputs(text=True)
    with fastcache.enable(model, Recipe(FirstBlock(THRESHOLD), Reuse(), Stack(1, 1))) as cache:
        run = fastcache.compile(model, backend="aot_eager")
        driven(cache, run, calls)
        (state,) = cache.denoisers[0].pool.states.values()
        own = state.slots[0].own
        audio, weights = own.extra.tensors()
        assert (audio.shape, weights.shape) == ((2, 2, toys.DIM), (2, toys.TOKENS))
        assert {id(audio), id(weights)} <= {id(t) for t in state.tensors()}
        cache.reset()
        driven(cache, run, calls)
        assert [t.data_ptr() for t in own.extra.tensors()] == [audio.data_ptr(), weights.data_ptr()]


class Joining(toys.Block):
    """Attends over both streams joined, and takes them apart by the length of the text."""

    def forward(self, hidden_states, encoder_hidden_states):  # type: ignore[override]
        both = torch.cat([hidden_states, encoder_hidden_states], 1)
        both = both + self.change(both)
        length = encoder_hidden_states.shape[1]
        return both[:, :-length], both[:, -length:]


class Picks(toys.Model):
    """Its text is what a mask leaves of it, as long as that holds: traced code cannot know the length."""

    def __init__(self) -> None:
        super().__init__(block=Joining, streams="he")

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None, mask=None):
        text = encoder_hidden_states[:, mask.nonzero()[:, 0]]
        return super().forward(hidden_states, timestep, text)


def test_a_length_that_depends_on_values_is_traced():
    mask = torch.tensor([1, 0, 1])
    calls = [{**call, "mask": mask} for call in toys.inputs(text=True)]
    found = []
    for way in ("eager", "fastcache.compile"):
        model = Picks()
        with fastcache.enable(model, Recipe(Mask(MASK), Reuse())) as cache:
            run = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
            found.append(driven(cache, run, calls))
            assert "." in toys.actions(cache)
    close(*found)
