# SPDX-License-Identifier: Apache-2.0
"""The rooms of the stack target, each by itself: what is learnt of the lists, and what follows from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache.models.adapter import ENCODER, HIDDEN
from fastcache.models.block_io import BlockIO
from fastcache.policies import COMPUTE, REUSE
from fastcache.predictors import Reuse, Taylor
from fastcache.runtime.patch import ATTACHED
from fastcache.storage.history import Timeline
from fastcache.storage.state import State
from fastcache.storage.unit import make_store
from fastcache.targets.control import HEAD, PENDING, REST, WHOLE
from fastcache.targets.outputs import BARE, Entries, ReturnLayout
from fastcache.targets.stack import residual
from fastcache.targets.stack.layout import BlockList, Entered, Layout, Left, Place, Segment
from fastcache.targets.stack.roles import BLOCK, roles_of
from fastcache.targets.stack.segments import ENTER, LEAVE, alone, continues_previous, cut

STRAIGHT, BUSY = False, True  # whether the loop does more
BOTH, OPENS, CLOSES, NEITHER = (True, True), (True, False), (False, True), (False, False)


# --- the roles ----------------------------------------------------------------------------------------------

ROLES = [
    # action, loop, whether it opens and closes, probed, blocks, what is handed out
    (COMPUTE, STRAIGHT, BOTH, False, 3, ["first", BLOCK, "last"]),
    (COMPUTE, STRAIGHT, BOTH, True, 3, ["run_first", BLOCK, "last"]),
    (COMPUTE, STRAIGHT, BOTH, False, 1, ["only"]),
    (COMPUTE, STRAIGHT, OPENS, False, 2, ["first", BLOCK]),
    (COMPUTE, STRAIGHT, CLOSES, False, 2, [BLOCK, "last"]),
    (COMPUTE, STRAIGHT, OPENS, False, 1, ["first"]),
    (COMPUTE, STRAIGHT, CLOSES, False, 1, ["last"]),
    (COMPUTE, STRAIGHT, NEITHER, False, 2, [BLOCK, BLOCK]),
    (COMPUTE, STRAIGHT, NEITHER, True, 1, ["run_first"]),
    (COMPUTE, BUSY, BOTH, False, 3, ["first", BLOCK, "last"]),
    (PENDING, STRAIGHT, BOTH, True, 3, ["run_first", BLOCK, "last"]),
    (REUSE, STRAIGHT, BOTH, False, 3, ["predict_segment"]),
    (REUSE, STRAIGHT, BOTH, True, 3, ["run_first", "predict_segment"]),
    (REUSE, STRAIGHT, OPENS, False, 3, ["predict_segment"]),
    (REUSE, STRAIGHT, CLOSES, False, 3, []),
    (REUSE, STRAIGHT, NEITHER, True, 1, ["run_first"]),
    (REUSE, BUSY, BOTH, False, 3, ["enter_segment", "pass_through", "leave_segment"]),
    (REUSE, BUSY, BOTH, True, 3, ["run_first", "pass_through", "leave_segment"]),
    (REUSE, BUSY, BOTH, False, 1, ["predict_segment"]),
    (REUSE, BUSY, OPENS, False, 2, ["enter_segment", "pass_through"]),
    (REUSE, BUSY, CLOSES, False, 2, ["pass_through", "leave_segment"]),
    (REUSE, BUSY, OPENS, False, 1, ["enter_segment"]),
    (REUSE, BUSY, CLOSES, False, 1, ["leave_segment"]),
    (REUSE, BUSY, NEITHER, True, 1, ["run_first"]),
]


@pytest.mark.parametrize(("action", "more", "ends", "probed", "count", "roles"), ROLES)
def test_roles_follow_from_action_and_place(action, more, ends, probed, count, roles):
    place = {"opens": ends[0], "closes": ends[1], "head": int(probed), "probed": probed}
    place["loop_does_more"] = more
    assert roles_of(action, WHOLE, range(count), **place) == roles
    if probed:
        assert roles_of(action, HEAD, range(count), **place) == roles
        again = ["restore_first", *roles[1:]]
        assert roles_of(action, REST, range(count), **place) == again


class Uncounted(list):
    def __len__(self) -> int:
        raise AssertionError("compiled code would guard every block")


def test_one_prediction_for_all_blocks_counts_none_of_them():
    place = {"opens": True, "closes": True, "head": 0, "probed": False}
    roles = roles_of(REUSE, WHOLE, Uncounted(), **place, loop_does_more=False)
    assert roles == ["predict_segment"]
    with pytest.raises(AssertionError):
        roles_of(COMPUTE, WHOLE, Uncounted(), **place, loop_does_more=False)


# --- the segments -------------------------------------------------------------------------------------------


def lists(*counts: int, probed: bool = False) -> list[BlockList]:
    made = [nn.ModuleList(toys.Block() for _ in range(n)) for n in counts]
    looked_at = [probed and i == 0 for i in range(len(counts))]
    return [
        BlockList(i, f"list{i}", m, None, (int(p), 0), p)
        for i, (m, p) in enumerate(zip(made, looked_at, strict=True))
    ]


def in_turn(*order: int) -> list[tuple[int, str]]:
    return [(at, kind) for at in order for kind in (ENTER, LEAVE)]


def test_lists_that_go_on_where_the_last_has_stopped_are_one_segment():
    found = cut(lists(2, 2, 2), in_turn(0, 1, 2), {1}, False, 5)
    assert found.segments == (Segment(5, (0, 1)), Segment(6, (2,)))
    assert (found.order, found.interleaved) == ((0, 1, 2), False)


def test_where_the_loop_does_more_every_list_has_a_segment():
    found = cut(lists(2, 2), in_turn(0, 1), {1}, True, 0)
    assert found.segments == (Segment(0, (0,)), Segment(1, (1,)))


def test_lists_that_take_turns_are_one_segment():
    events = [(0, ENTER), (1, ENTER), (0, LEAVE), (1, LEAVE)]
    found = cut(lists(2, 2), events, set(), False, 0)
    assert found.interleaved
    assert found.segments == (Segment(0, (0, 1)),)


def test_a_list_of_the_probed_block_alone_is_in_no_segment():
    both = lists(1, 2, probed=True)
    assert alone(both[0]) and not alone(both[1])
    assert cut(both, in_turn(1), set(), False, 0).segments == (Segment(0, (1,)),)


@pytest.mark.parametrize(
    ("made", "events", "says"),
    [
        (lists(2, 2), in_turn(0), r"did not iterate over \['list1'\]"),
        (lists(2), in_turn(0, 0), "more than once in a call"),
        (lists(2, 2, probed=True), in_turn(1, 0), "runs list1 before list0"),
    ],
)
def test_lists_without_a_residual_are_refused(made, events, says):
    with pytest.raises(ValueError, match=says):
        cut(made, events, set(), False, 0)


def test_a_list_continues_the_one_before_also_with_text_joined_in_front():
    left = torch.randn(2, 4, 8)
    joined = torch.cat([torch.randn(2, 3, 8), left], 1)
    assert continues_previous(left, left.clone())
    assert continues_previous(left, joined)
    assert not continues_previous(left, left + 1)
    assert not continues_previous(left, joined.flip(1))
    assert not continues_previous(joined, left)


# --- the layout ---------------------------------------------------------------------------------------------


def test_a_layout_is_data_and_its_numbers_are_never_used_twice():
    one = Layout((0, 1), (Segment(3, (0,)), Segment(4, (1,))), (Place(), Place()))
    assert (one.number, one.next_number) == (3, 5)
    assert (Layout().number, Layout().next_number) == (-1, 0)
    assert one.apart
    assert not dataclasses.replace(one, segments=(Segment(5, (0, 1)),)).apart
    assert dataclasses.replace(one, segments=(Segment(5, (0, 1)),), interleaved=True).apart
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.writes_inputs = True  # type: ignore[misc]
    keys = {one.key, *(dataclasses.replace(one, **{f: True}).key for f in FLAGS), Layout().key}
    assert len(keys) == 4


FLAGS = ("loop_does_more", "writes_inputs")


def learnt(model: nn.Module, call: dict[str, Any], config: Any = None) -> Layout:
    """What the first call shows of a model."""
    config = config or toys.config("mag_cache")
    with fastcache.enable(model, config) as cache:
        toys.run(cache, model, [call])
        return model.__dict__[ATTACHED].targets[0].layout


class Extended(toys.Model):
    """Adds something between blocks, as a ControlNet's residuals are."""

    extra = 0.0

    def through(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for block in self._blocks():
            hidden = block(hidden)
            if self.extra:
                hidden = hidden + self.extra
        return hidden, text


class Between(toys.Model):
    """Does something between its two lists."""

    def through(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for block in self.blocks:
            hidden = block(hidden)
        hidden = 2 * hidden
        for block in self.layers:
            hidden = block(hidden)
        return hidden, text


class Alternating(toys.Model):
    """A block of one list, then a block of the other."""

    def through(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for one, other in zip(self.blocks, self.layers, strict=True):
            hidden = one(hidden)
            hidden = other(hidden)
        return hidden, text


TWO = ("blocks", "layers")


def test_what_a_plain_stack_shows():
    assert learnt(toys.Model(), toys.inputs()[0]) == Layout(
        order=(0,), segments=(Segment(0, (0,)),), places=(Place(0, True, True),)
    )


def test_what_lists_in_a_row_show():
    found = learnt(toys.Model(lists=TWO), toys.inputs()[0])
    assert found.order == (0, 1)
    assert found.segments == (Segment(0, (0, 1)),)
    assert found.places == (Place(0, opens=True), Place(0, closes=True, opener=0))


def test_what_lists_apart_show():
    found = learnt(Between(lists=TWO), toys.inputs()[0])
    assert found.segments == (Segment(0, (0,)), Segment(1, (1,)))
    assert [p.opener for p in found.places] == [0, 1]
    assert not found.loop_does_more


def test_what_lists_that_take_turns_show():
    found = learnt(Alternating(lists=TWO), toys.inputs()[0])
    assert found.interleaved and found.loop_does_more
    assert found.segments == (Segment(0, (0, 1)),)


def test_what_a_busy_loop_and_blocks_that_write_show():
    model = Extended()
    model.extra = 0.5
    assert learnt(model, toys.inputs()[0]).loop_does_more
    found = learnt(toys.Model(block=toys.InPlace), toys.inputs()[0])
    assert found.writes_inputs and not found.loop_does_more


@pytest.mark.parametrize("method", ["mag_cache", "first_block"])
@pytest.mark.parametrize(
    ("shape", "returns", "positions"),
    [
        ("tensor", BARE, None),
        ("tuple of one", ReturnLayout(tuple, 1, 0), (0, None)),
        ("(hidden, encoder)", ReturnLayout(tuple, 2, 0, 1), (0, 1)),
        ("(encoder, hidden)", ReturnLayout(tuple, 2, 1, 0), (1, 0)),
        ("extra returns", ReturnLayout(tuple, 4, 0, 1), (0, 1)),
    ],
)
def test_the_order_of_returns_is_learnt(method, shape, returns, positions):
    """Also where both streams are of one shape, so that only the next block's call tells them apart."""
    with_text = toys.SHAPES[shape][1]
    for text in (None, toys.TOKENS):
        call = toys.inputs(text=with_text)[0]
        if with_text and text:
            call["encoder_hidden_states"] = torch.randn(2, text, toys.DIM)
        place = learnt(toys.model(shape), call, toys.config(method)).places[0]
        assert (place.returns, place.positions) == (returns, positions)


def test_a_failed_recording_leaves_nothing_behind():
    """The call after one that raised learns from the beginning."""
    model, calls = toys.Model(lists=TWO), toys.inputs(3)
    reference = toys.plain(model, calls)
    with fastcache.enable(model, toys.config("mag_cache")) as cache:
        target = model.__dict__[ATTACHED].targets[0]
        handle = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toys.run(cache, model, calls[:1])
        handle.remove()
        assert target.layout == Layout()
        outputs = toys.run(cache, model, calls[:1])
        assert target.layout.segments == (Segment(0, (0, 1)),)
    assert torch.equal(outputs[0], reference[0])


def test_a_new_cut_lets_other_contexts_compute_and_say_so():
    """A context whose storage was of an earlier cut was told to reuse it: KeyError in the middle of a run."""
    model, calls = Extended(lists=TWO), toys.inputs()
    config = toys.config("mag_cache", mag_ratios=[1.0] * toys.STEPS, retention_ratio=0.1)
    with fastcache.enable(model, config) as cache:
        for i, call in enumerate(calls[:3]):
            for name, extra in (("cond", 0.0), ("uncond", 0.5)):
                model.extra = extra
                with cache.context(name):
                    toys.step(model, call)
            if i == 0:
                assert model.__dict__[ATTACHED].targets[0].layout.number == 1
        records = [(r.context, r.action, r.reason) for r in cache.stats]
    assert records[2] == ("cond", COMPUTE, "nothing valid to reuse")
    assert [action for _, action, _ in records[3:]] == [REUSE, REUSE, REUSE]


# --- the residual -------------------------------------------------------------------------------------------


def stored(
    entered: Entered, left: Left, predictor: Any = None, measure: bool = False
) -> tuple[State, Any]:
    """A state with one segment, number 7, stored by one computed step."""
    predictor = predictor or Reuse()
    state = State((0, "cond"), 1)
    timeline = Timeline(predictor.depth)
    state.timelines = [timeline]
    unit = residual.allocate_unit(
        entered, left, timeline, lambda value, t: make_store(predictor, value, t)
    )
    state.units[0][7] = unit
    residual.keep(state, 0, 7, entered, left, measure)
    timeline.push(0)
    return state, unit


def given_back(unit: Any, entered: Entered, returns: ReturnLayout) -> Any:
    return residual.predict(unit, entered.hidden, entered.encoder, (1.0,), returns)


def test_a_residual_gives_back_what_was_left():
    x, y = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    _, unit = stored(Entered(x, None), Left(y, None, {}))
    assert unit.template == (True, False, False, Entries.of({})) and unit.touched
    torch.testing.assert_close(given_back(unit, Entered(x, None), BARE), y)


def test_text_and_other_entries_are_given_back_too():
    x, y, text, new = (torch.randn(2, n, 8) for n in (6, 6, 3, 3))
    mask = torch.randn(2, 6)
    entered, left = (
        Entered(x, text),
        Left(y, new, {2: mask, 3: None, 4: [text, {"a": mask, "b": 1}]}),
    )
    _, unit = stored(entered, left)
    assert unit.template[:3] == (True, False, True) and unit.template.extras.at == (0, 2, 3)
    got = given_back(unit, entered, ReturnLayout(tuple, 5, 0, 1))
    torch.testing.assert_close(got, (y, new, mask, None, [text, {"a": mask, "b": 1}]))


@pytest.mark.parametrize("passed_on", [True, False])
def test_text_that_no_residual_is_kept_of(passed_on):
    """The same tensor, or one that was not noted since nobody reads it."""
    x, y, text = (torch.randn(2, n, 8) for n in (6, 6, 3))
    entered = Entered(x, text if passed_on else None)
    _, unit = stored(entered, Left(y, text, {}))
    assert unit.template == (True, False, False, Entries.of({}))
    assert given_back(unit, entered, ReturnLayout(tuple, 2, 0, 1))[1] is entered.encoder


def test_text_joined_in_front_is_left_out_of_the_residual():
    x, y = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    _, unit = stored(Entered(x, None), Left(torch.cat([torch.randn(2, 3, 8), y], 1), None, {}))
    assert unit.template.base is True and unit.template.joined
    torch.testing.assert_close(given_back(unit, Entered(x, None), BARE), y)


def test_frames_and_tokens_may_change_places():
    batch, frames, tokens = 2, 3, 5
    x = torch.arange(batch * frames * tokens * 4.0).reshape(batch * frames, tokens, 4)
    y = torch.randn(batch * tokens, frames, 4)
    assert residual.turns(x.shape, y.shape) and not residual.turns(x.shape, y.shape[:2])
    turned = residual.turned(x, y.shape)
    assert torch.equal(turned[1 * tokens + 4, 2], x[1 * frames + 2, 4])
    _, unit = stored(Entered(x, None), Left(y, None, {}))
    assert unit.template.base == y.shape
    torch.testing.assert_close(given_back(unit, Entered(x, None), BARE), y)


def test_a_value_of_another_shape_is_kept_as_it_is():
    x, y = torch.randn(2, 6, 8), torch.randn(2, 9, 4)
    _, unit = stored(Entered(x, None), Left(y, None, {}))
    assert unit.template.base is False
    assert torch.equal(given_back(unit, Entered(torch.zeros_like(x), None), BARE), y)


def test_the_magnitude_ratio_is_of_this_residual_to_the_last():
    x, y = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    entered = Entered(x, None)
    state, _ = stored(entered, Left(y, None, {}), measure=True)
    residual.keep(state, 0, 7, entered, Left(x + 3 * (y - x), None, {}), True)
    first, second = state.measured
    assert first.item() == 1.0
    assert second.item() == pytest.approx(3.0, rel=1e-5)


def test_a_history_is_weighed():
    x, y = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    entered = Entered(x, None)
    state, unit = stored(entered, Left(y, None, {}), Taylor(1))
    residual.keep(state, 0, 7, entered, Left(y + 1, None, {}), False)
    state.timelines[0].push(1)
    got = residual.predict(unit, x, None, (2.0, -1.0), BARE)
    torch.testing.assert_close(got, x + 2 * (y + 1 - x) - (y - x))


# --- how blocks return --------------------------------------------------------------------------------------


def test_a_learnt_order_comes_before_shapes_and_after_a_row():
    x, text = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    io, output = BlockIO(toys.Dual()), (torch.randn(2, 6, 8), torch.randn(2, 6, 8), None)
    assert io.positions(output, x, text, None) == (0, 1)
    assert io.positions(output, x, text, (1, 0)) == (1, 0)
    assert io.positions(output, x, text, (5, 0)) == (0, 1)  # learnt of another call
    assert io.taken_apart(output, x, text, (1, 0)) == (output[1], output[0], {2: None})
    assert io.streams(output[0], x, text, None) == (output[0], text)
    row = BlockIO(toys.Dual(), fastcache.Block(returns=(ENCODER, HIDDEN)))
    assert row.positions(output, x, text, (0, 1)) == (1, 0)
    assert row.taken_apart(output, x, text, None)[2] == {2: None}


def test_returns_are_built_as_they_were_seen():
    a, b = object(), object()
    assert ReturnLayout.of(torch.zeros(1), None, None) == BARE
    assert BARE.build(a, b, {}) is a
    for kind in (tuple, list):
        layout = ReturnLayout.of(kind([0, 1, 2]), 2, 0)
        built = layout.build(a, b, {1: "extra"})
        assert built == kind([b, "extra", a]) and type(built) is kind


# --- a model of diffusers -----------------------------------------------------------------------------------


def test_flux_shows_two_lists_that_go_on():
    model, inputs = tiny.build("Flux")
    config = fastcache.MagCacheConfig(mag_ratios=torch.ones(4), num_inference_steps=4)
    with fastcache.enable(model, config) as cache, torch.no_grad():
        with cache.context("cond"):
            model(**inputs)
        layout = model.__dict__[ATTACHED].targets[0].layout
    assert len(layout.segments) == 1 and layout.order == (0, 1)
    assert [p.returns for p in layout.places] == [ReturnLayout(tuple, 2, 1, 0)] * 2
