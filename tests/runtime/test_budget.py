# SPDX-License-Identifier: Apache-2.0
"""The budget of bytes, told apart from everything that runs on it."""

from __future__ import annotations

import pytest
import torch

from fastcache.storage.budget import Budget, budget_of
from fastcache.storage.pool import Slots
from fastcache.storage.ring import Ring
from fastcache.storage.state import State
from fastcache.storage.unit import Unit

CPU = torch.device("cpu")
ONE = 16  # bytes of a state
SIGNATURE = (("small",),)


def called(
    budget: Budget, pool: Slots, request: int, total: int = 9, signature: tuple = SIGNATURE
) -> State:
    """A state that has just been called, with storage of four float32 numbers."""
    key = (request, "cond")
    state = pool.states.get(key) or pool.add(key)
    if state.signature is None:
        pool.adopt(state, signature)
    state.total = total
    if not budget.refuses(pool, state, None, CPU) and not state.units[0]:
        unit = state.units[0][0] = Unit()
        unit.streams = [Ring(torch.ones(4), state.timelines[0])]
    state.index += 1
    budget.keep(pool, state)
    return state


def world(limit: int, offload: bool = False, pools: int = 1) -> tuple[Budget, list[Slots]]:
    members = [Slots([1]) for _ in range(pools)]
    return Budget(limit, offload, members), members


def test_bytes_and_the_order_of_calls_are_noted():
    budget, (pool,) = world(3 * ONE)
    first, second = called(budget, pool, 1), called(budget, pool, 2)
    assert (first.held, second.held) == (ONE, ONE) and first.used < second.used
    assert pool.sizes == {SIGNATURE: ONE} and pool.nbytes() == 2 * ONE


def test_spares_go_before_any_run():
    budget, (pool,) = world(2 * ONE)
    called(budget, pool, 1)
    goes_on = called(budget, pool, 2)
    pool.forget((1, "cond"))
    assert [spare.held for spare in pool.spares] == [ONE]
    called(budget, pool, 3, signature=(("other",),))  # which cannot use the spare
    assert not pool.spares and goes_on.held == ONE and not goes_on.evicted


def test_complete_runs_go_before_those_that_go_on_and_then_the_one_used_least_recently():
    budget, (pool,) = world(2 * ONE)
    goes_on, complete = called(budget, pool, 1), called(budget, pool, 2, total=1)
    newer = called(budget, pool, 3)
    assert complete.evicted and not complete.held and not goes_on.evicted
    called(budget, pool, 4)
    assert goes_on.evicted and not goes_on.held and not newer.evicted
    assert pool.nbytes() == 2 * ONE


def test_all_denoisers_of_a_cache_share_it():
    budget, (one, two) = world(ONE, pools=2)
    first = called(budget, one, 1)
    second = called(budget, two, 1)
    assert first.evicted and not one.nbytes() and second.held == two.nbytes() == ONE


def test_an_evicted_run_comes_back_once_the_others_are_done():
    budget, (pool,) = world(ONE)
    first, second = called(budget, pool, 1), called(budget, pool, 2)
    assert first.evicted and budget.refuses(pool, first, None, CPU)
    second.total = second.index  # complete
    assert not budget.refuses(pool, first, None, CPU) and not first.evicted


def test_room_is_made_before_a_run_of_known_size_allocates():
    budget, (pool,) = world(ONE)
    first = called(budget, pool, 1)
    other = pool.add((2, "cond"))
    pool.adopt(other, SIGNATURE)
    assert not budget.refuses(pool, other, None, CPU)
    assert first.evicted and not pool.nbytes()  # before the other has allocated anything


def test_a_run_above_the_limit_alone_is_left_without_and_never_tried_again():
    budget, (pool,) = world(ONE)
    state = pool.add((1, "cond"))
    pool.adopt(state, SIGNATURE)
    assert not budget.refuses(pool, state, None, CPU)  # nobody knows its size yet
    unit = state.units[0][0] = Unit()
    unit.streams = [Ring(torch.ones(5), state.timelines[0])]
    assert budget.keep(pool, state) == 20 and not pool.nbytes()
    assert budget.refuses(pool, state, None, CPU)


def test_what_is_offloaded_comes_back_with_its_values():
    budget, (pool,) = world(ONE, offload=True)
    first = called(budget, pool, 1)
    first.tensors()[0].fill_(7.0)
    called(budget, pool, 2)
    assert first.away == ONE and not first.held and not first.evicted
    assert pool.nbytes() == ONE  # host memory is not counted
    assert not budget.refuses(pool, first, None, CPU)
    assert not first.away and first.held == ONE and first.tensors()[0].eq(7.0).all()
    assert pool.states[2, "cond"].away == ONE


@pytest.mark.parametrize("fixed, total", [(True, 9), (False, 1)], ids=["graphs", "complete"])
def test_storage_that_graphs_know_or_nobody_needs_is_freed_not_offloaded(fixed, total):
    budget, (pool,) = world(ONE, offload=True)
    first = called(budget, pool, 1, total=total)
    pool.fixed = fixed
    called(budget, pool, 2)
    assert first.evicted and not first.away and not first.held


def test_ranks_agree_on_a_refusal(monkeypatch):
    from fastcache import sync

    budget, (pool,) = world(ONE)
    state = called(budget, pool, 1)
    asked = []

    def any_rank(flag, group, device):
        asked.append((flag, group))
        return True

    monkeypatch.setattr(sync, "any_rank", any_rank)
    assert not budget.refuses(pool, state, None, CPU) and not asked
    assert budget.refuses(pool, state, "ranks", CPU) and asked == [(False, "ranks")]


@pytest.mark.parametrize(
    "max_bytes, offload, error, says",
    [
        (-1, False, ValueError, "max_bytes is -1"),
        ("1 GB", False, TypeError, "max_bytes"),
        (True, False, TypeError, "max_bytes"),
        (10, "yes", TypeError, "offload is 'yes'"),
        (None, True, ValueError, "offload is True, needs max_bytes"),
    ],
)
def test_bad_limits_are_refused_by_name(max_bytes, offload, error, says):
    with pytest.raises(error, match=says):
        budget_of(max_bytes, offload, [])


def test_no_limit_is_no_budget():
    assert budget_of(None, False, []) is None
    budget = budget_of(0, True, [])
    assert budget is not None and budget.limit == 0 and budget.offload
