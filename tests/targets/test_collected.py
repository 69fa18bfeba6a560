# SPDX-License-Identifier: Apache-2.0
"""Models that keep what each block returns, as a ControlNet does: refused where they would be left without."""

from __future__ import annotations

import pytest
import toys
from ends import MASK, close, driven

import fastcache
from fastcache import FirstBlock, Mask, Recipe, Reuse, Stack


class Collects(toys.Model):
    """Needs what each of its blocks returns, as a ControlNet does. kind: of what it collects that in."""

    kind: type = list

    def through(self, hidden, text):
        kept = self.kind()
        for block in self.blocks:
            hidden = self._call(block, hidden, None)
            kept = self.kind([*kept, hidden])
        return sum((i + 1) * each for i, each in enumerate(kept)), text


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize(
    ("depth", "first", "last"),
    [(2, 0, 0), (3, 1, 0), (3, 0, 1), (3, 0, 0), (4, 1, 1), (4, 2, 0), (5, 1, 1)],
)
def test_a_model_that_keeps_what_skipped_blocks_return_is_refused(depth, first, last, kind):
    model = Collects(depth=depth)
    model.kind = kind
    with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack(first, last))):
        with pytest.raises(ValueError, match="keeps what each block"):
            toys.step(model, toys.inputs(1)[0])


@pytest.mark.parametrize("style", ["keyword", "positional"])
@pytest.mark.parametrize(
    ("depth", "first", "last", "when"),
    [
        *((*ends, Mask(MASK)) for ends in ((1, 0, 0), (2, 1, 0), (2, 0, 1), (3, 1, 1), (3, 2, 0))),
        *((*ends, FirstBlock(1.0)) for ends in ((2, 1, 0), (3, 1, 1))),
    ],
)
def test_one_skipped_block_alone_is_what_its_prediction_stands_in_for(
    depth, first, last, when, style
):
    """What stands still is what the model gives."""
    model, call = Collects(depth=depth, style=style), toys.inputs(1)[0]
    (wanted,) = toys.plain(model, [call])
    with fastcache.enable(model, Recipe(when, Reuse(), Stack(first, last))) as cache:
        close(driven(cache, model, [call] * len(MASK)), [wanted] * len(MASK))
        assert "." in toys.actions(cache)


def test_what_no_second_part_of_a_step_gives_back_is_refused_too():
    """Of several blocks before the decision the last one alone is kept."""
    model = Collects(depth=3)
    with fastcache.enable(model, Recipe(FirstBlock(1.0), Reuse(), Stack(2, 0))):
        with pytest.raises(ValueError, match="keeps what each block"):
            toys.step(model, toys.inputs(1)[0])


def test_two_blocks_of_a_plain_model_are_skipped():
    for style in ("keyword", "positional"):
        model, calls = toys.Model(depth=2, style=style), toys.inputs()
        with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack())) as cache:
            driven(cache, model, calls)
            assert "." in toys.actions(cache)


class Walks(toys.Model):
    """Two blocks, gone through as `way` says; `keeps` what each returns, needed or not."""

    way = "loop"
    keeps = "nothing"

    def walked(self):
        if self.way == "counted":  # never asks for what comes after the last block
            return (block for _, block in zip(range(2), self.blocks, strict=False))
        if self.way == "index":
            return (self.blocks[i] for i in range(2))
        return iter(list(self.blocks)) if self.way == "listed" else iter(self.blocks)

    def through(self, hidden, text):
        if self.keeps == "a generator's":
            return sum(list(self.each(hidden))), text
        kept = self.kept = []
        for block in self.walked():
            before, hidden = hidden, self._call(block, hidden, None)
            if self.keeps == "all":
                kept.append(hidden)
        if self.keeps == "what came before":
            hidden = hidden + 0 * before
        return sum(kept, hidden), text

    def each(self, hidden):
        for block in self.walked():
            hidden = self._call(block, hidden, None)
            yield hidden


@pytest.mark.parametrize("style", ["keyword", "positional"])
@pytest.mark.parametrize("way", ["loop", "counted", "index", "listed"])
@pytest.mark.parametrize("keeps", ["all", "a generator's", "nothing"])
def test_it_is_seen_however_the_list_is_gone_through(way, keeps, style):
    model, calls = Walks(depth=2, style=style), toys.inputs()
    model.way, model.keeps = way, keeps
    with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack())) as cache:
        if keeps == "nothing":
            driven(cache, model, calls)
            assert "." in toys.actions(cache)
        else:
            with pytest.raises(ValueError, match="keeps what each block"):
                driven(
                    cache, model, calls[:2]
                )  # a loop that never ends shows it at the second call


@pytest.mark.parametrize("style", ["keyword", "positional"])
def test_the_end_of_a_loop_shows_it_without_a_look_at_the_whole_process(style, monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr("gc.get_referrers", lambda *objects: asked.append(objects) or [])
    model, calls = toys.Model(depth=2, style=style), toys.inputs()
    with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack())) as cache:
        driven(cache, model, calls)
        assert "." in toys.actions(cache) and not asked


def test_a_variable_of_the_loop_is_no_collection():
    model, calls = Walks(depth=2), toys.inputs()
    model.keeps = "what came before"
    with fastcache.enable(model, Recipe(Mask(MASK), Reuse(), Stack())) as cache:
        driven(cache, model, calls)
        assert "." in toys.actions(cache)


class GivesBack(toys.Block):
    """A block that is switched off: it returns what it was given."""

    def forward(self, hidden_states, scale=1.0):
        return hidden_states


@pytest.mark.parametrize("style", ["keyword", "positional"])
@pytest.mark.parametrize(("depth", "when"), [(2, Mask(MASK)), (4, Mask(MASK)), (4, FirstBlock(9))])
def test_blocks_that_return_what_they_are_given_keep_nothing(depth, when, style):
    """What the first one has returned is then alive to the end, since it is what the model goes on with."""
    model, calls = toys.Model(depth=depth, style=style), toys.inputs()
    for i in range(1, depth):
        model.blocks[i] = GivesBack()
    with fastcache.enable(model, Recipe(when, Reuse(), Stack())) as cache:
        driven(cache, model, calls)
        assert "." in toys.actions(cache)
