# SPDX-License-Identifier: Apache-2.0
"""The states of one model: who gets which storage, what is kept, and which runs are over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcache.storage.allocate import allocate
from fastcache.storage.pool import SPARE, SPARES, Slots
from fastcache.storage.ring import Ring
from fastcache.storage.state import State
from fastcache.storage.unit import Unit
from fastcache.targets.meters.base import SignalSlots

SMALL, LARGE = (("small",),), (("large",),)  # signatures of calls


def filled(pool: Slots, key: tuple, signature: tuple = SMALL, steps: int = 1) -> State:
    """A state whose storage holds ones, after so many steps."""
    state = pool.states.get(key) or pool.add(key)
    if state.signature != signature:
        pool.adopt(state, signature)
    if not state.units[0]:
        unit = Unit()
        unit.streams = [Ring(torch.ones(4 if signature is SMALL else 16), state.timelines[0])]
        state.units[0][0] = unit
        signal = state.slots[0]
        signal.kept_reference = True
        signal.reference = allocate((2,), torch.float32, torch.device("cpu"))
    for step in range(steps):
        buffer_of(state).fill_(1.0)
        state.units[0][0].stored(state.timelines[0].pushes, True)
        state.timelines[0].push(step)
        state.index = step + 1
    return state


def buffer_of(state: State) -> Tensor:
    return state.units[0][0].streams[0].buffer


@pytest.fixture
def pool() -> Slots:
    return Slots([1], [SignalSlots])


def test_a_state_has_one_history_per_rule():
    state = Slots([1, 3, 0]).add((0, "cond"))
    assert [t.depth for t in state.timelines] == [1, 3, 0] and len(state.units) == 3


def test_storage_that_is_given_back_serves_the_next_run_of_its_signature(pool):
    old = filled(pool, (0, "cond"))
    buffer = buffer_of(old)
    pool.forget((0, "cond"))
    assert not pool.states and len(pool.spares) == 1
    other = pool.add((1, "cond"))
    pool.adopt(other, LARGE)
    assert not other.units[0] and len(pool.spares) == 1  # it does not fit
    new = pool.add((2, "cond"))
    pool.adopt(new, SMALL)
    assert buffer_of(new) is buffer and not pool.spares
    assert new.signature == SMALL and new.key == (2, "cond")


def test_storage_that_is_given_back_is_empty(pool):
    state = filled(pool, (0, "cond"))
    buffer = buffer_of(state)
    pool.forget((0, "cond"))
    (spare,) = pool.spares
    assert not buffer.any() and not spare.timelines[0].steps and not spare.slots[0].kept_reference
    assert not spare.units[0][0].ready(spare.timelines[0])


def test_calls_of_another_signature_begin_a_run_with_other_storage(pool):
    state = filled(pool, (0, "cond"), steps=3)
    small = buffer_of(state)
    pool.adopt(state, LARGE)
    assert state.index == 0 and state.signature == LARGE and not state.units[0]
    assert [(run.key, run.computed) for run in pool.ended] == [((0, "cond"), 3)]
    pool.adopt(state, SMALL)
    assert buffer_of(state) is small and not small.any()


def test_at_most_so_many_spares_are_kept_the_oldest_goes_first(pool):
    buffers = []
    for request in range(SPARES + 2):
        buffers.append(buffer_of(filled(pool, (request, "cond"))))
    for request in range(SPARES + 2):
        pool.forget((request, "cond"))
    assert [buffer_of(s) for s in pool.spares] == [*buffers[2:]] and len(pool.spares) == SPARES


def test_a_state_without_storage_leaves_no_spare(pool):
    pool.adopt(pool.add((0, "cond")), SMALL)
    pool.forget((0, "cond"))
    assert not pool.spares


# --- runs that are over ---------------------------------------------------------------------------


def test_a_run_is_over_once_and_only_if_it_had_a_step(pool):
    filled(pool, (0, "a"), steps=2)
    filled(pool, (0, "b"), steps=0)
    for key in ((0, "a"), (0, "b")):
        pool.forget(key)
    assert [(run.key, run.computed) for run in pool.ended] == [((0, "a"), 2)]


def test_a_run_that_is_over_keeps_its_records_when_the_next_one_begins(pool):
    state = filled(pool, (0, "cond"), steps=2)
    state.records.extend(["first", "second"])
    pool.begin_anew(state)
    state.records.append("third")
    assert [list(run.records) for run in pool.ended] == [["first", "second"]]
    assert state.index == 0 and not buffer_of(state).any()


# --- complete runs --------------------------------------------------------------------------------


def complete(pool: Slots, request: int, signature: tuple = SMALL) -> State:
    state = filled(pool, (request, "cond"), signature, steps=3)
    state.total = 3
    pool.retire(state)
    return state


def test_few_complete_runs_are_kept(pool):
    for request in range(
        SPARES + 3
    ):  # of other signatures, or the next would take over the storage
        complete(pool, request, ((request,),))
    assert [request for request, _ in pool.states] == [*range(3, SPARES + 3)]
    assert [run.key[0] for run in pool.ended] == [0, 1, 2]


def test_a_run_that_goes_on_is_never_retired(pool):
    going = filled(pool, ("long", "cond"), steps=2)
    pool.retire(going)
    for request in range(SPARES + 3):
        complete(pool, request, ((request,),))
    assert pool.states["long", "cond"] is going


def test_storage_of_a_complete_run_is_taken_before_more_is_allocated(pool):
    done = complete(pool, 0)
    buffer = buffer_of(done)
    new = pool.add((1, "cond"))
    pool.adopt(new, SMALL)
    assert buffer_of(new) is buffer and (0, "cond") not in pool.states


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_are_told_by_context_and_for_the_next_run(pool):
    assert pool.held() == {} and pool.nbytes() == 0
    one = 4 * 4 + 2 * 4  # a row of four and a residual of two, in float32
    filled(pool, (0, "a"))
    filled(pool, (0, "b"))
    assert pool.held() == {"a": one, "b": one}
    filled(pool, (1, "a"))
    assert set(pool.held()) == {"0 a", "0 b", "1 a"}
    pool.forget((1, "a"))
    assert pool.held() == {"a": one, "b": one, SPARE: one} and pool.nbytes() == 3 * one


def test_dropped_storage_is_gone_and_the_run_goes_on(pool):
    state = filled(pool, (0, "cond"), steps=2)
    pool.drop(state)
    assert state.index == 2 and not state.units[0] and not pool.nbytes() and not pool.spares
    assert not pool.ended


def test_storage_goes_to_the_host_and_comes_back(pool):
    state = filled(pool, (0, "cond"))
    state.held = state.nbytes()
    pool.send_away(state)
    assert state.away and not state.held and not pool.nbytes()
    pool.bring_back(state, torch.device("cpu"))
    assert state.held == pool.nbytes() > 0 and buffer_of(state).eq(1).all()
    assert state.units[0][0].ready(state.timelines[0])


def test_clearing_leaves_nothing(pool):
    filled(pool, (0, "cond"))
    pool.forget((0, "cond"))
    filled(pool, (1, "cond"), LARGE)
    pool.clear()
    assert not pool.states and not pool.spares and not pool.nbytes()
