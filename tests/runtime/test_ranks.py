# SPDX-License-Identifier: Apache-2.0
"""Several ranks share samples: they decide alike, refuse different plans, and never wait for ever."""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import toys
from modulated import ADAPTER, ModulatedModel
from torch import distributed as dist

import fastcache

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

RUNS, DEADLINE = 100, 5.0  # per world size; seconds


def rank_main(rank: int, world: int, path: str, job: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=DEADLINE),
    )
    jobs = {"decide": decide, "named": named, "vote": vote, "refuse": refuse, "die": die}
    jobs |= {"led": led, "led vote": led_vote}
    results.put((rank, jobs[job](rank, world)))
    results.close()
    results.join_thread()
    os._exit(0)  # a group with a dead member would wait at its own end


def together(world: int, job: str, tmp_path: Any, survivors: int | None = None) -> list[Any]:
    """What each rank returned, by rank. A rank that hangs fails the test, not the test run."""
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(r, world, str(tmp_path / "store"), job, results))
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        found = dict(results.get(timeout=90) for _ in range(survivors or world))
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
    return [found[r] for r in sorted(found)]


def threshold(seed: int) -> float:
    return 0.02 + 0.01 * (seed % 12)


def shards(seed: int, world: int) -> list[dict[str, Any]]:
    return toys.inputs(6, seed, batch=world, speed=0.05 + 0.01 * (seed % 7))


def first_block(
    calls: list[dict[str, Any]], seed: int, group: Any, ranks: str = "sum"
) -> list[tuple]:
    target, config = toys.Model(seed=seed), toys.config("first_block", threshold=threshold(seed))
    with fastcache.enable(target, config, process_group=group, ranks=ranks) as cache:
        toys.run(cache, target, calls, num_inference_steps=len(calls))
        return [(r.action, r.signal) for r in cache.stats]


# --- in every rank --------------------------------------------------------------------------------


def decide(rank: int, world: int) -> list[Any]:
    """Per run: what is decided together and what this rank would have decided alone."""
    found = []
    for seed in range(RUNS):
        calls = [{k: v[rank : rank + 1] for k, v in call.items()} for call in shards(seed, world)]
        shared, own = (first_block(calls, seed, group) for group in (dist.group.WORLD, None))
        found.append((shared, own))
    return found


NAMED: dict[str, Any] = {
    "tea": fastcache.TeaCacheConfig(0.3, (1, 0)),
    "easy": fastcache.EasyCacheConfig(0.3, token_stride=1),
    "sen": fastcache.SenCacheConfig(1.0, 0.5, 0.0),
    "sea": fastcache.SeaCacheConfig(
        0.5,
        raw_vision_callback=lambda model, args, kwargs: [kwargs["hidden_states"][:, None, None]],
    ),
}


def one_named(
    method: str,
    calls: list[dict[str, Any]],
    group: Any,
    odd: bool = False,
    ranks: str = "sum",
) -> list:
    """odd: this rank alone does not know the sigma of one step."""
    target = ModulatedModel() if method == "tea" else toys.Model()
    adapter = ADAPTER if method == "tea" else None
    with fastcache.enable(
        target, NAMED[method], process_group=group, adapter=adapter, ranks=ranks
    ) as cache:
        for i, call in enumerate(calls):
            sigma = None if odd and i == 7 else 1 - i / len(calls)
            with cache.context(num_inference_steps=len(calls), sigma=sigma):
                toys.step(target, call)
        return [(r.action, r.signal) for r in cache.stats]


def mine(calls: list[dict[str, Any]], rank: int) -> list[dict[str, Any]]:
    return [{k: v[rank : rank + 1] for k, v in call.items()} for call in calls]


def named(rank: int, world: int) -> dict[str, list]:
    """Per method: what is decided together, each rank with a sample of its own."""
    return {
        method: [
            one_named(method, mine(toys.inputs(12, seed, batch=world), rank), dist.group.WORLD)
            for seed in range(5)
        ]
        for method in NAMED
    }


def vote(rank: int, world: int) -> list:
    """A rank that does not know a fact has all of them compute."""
    calls = mine(toys.inputs(12, batch=world, speed=0.02), rank)
    return one_named("sea", calls, dist.group.WORLD, odd=rank == world - 1)


def led(rank: int, world: int) -> list[Any]:
    """Per run: what the first rank decides for all, and what this rank would have decided alone."""
    found = []
    for seed in range(RUNS // 4):
        calls = mine(shards(seed, world), rank)
        shared = first_block(calls, seed, dist.group.WORLD, ranks="first")
        found.append((shared, first_block(calls, seed, None)))
    return found


def led_vote(rank: int, world: int) -> list:
    """A rank that follows and does not know a fact has all of them compute all the same."""
    calls = mine(toys.inputs(12, batch=world, speed=0.02), rank)
    return one_named("sea", calls, dist.group.WORLD, odd=rank == world - 1, ranks="first")


def refuse(rank: int, world: int) -> list[str]:
    """The errors of runs of which one rank's differs from the others'."""
    odd = rank == world - 1
    cases: list[tuple[Any, dict[str, Any]]] = [
        (toys.config("mag_cache", threshold=0.1 if odd else 0.2), {}),
        (toys.config("mag_cache"), {"num_inference_steps": 9 if odd else 10}),
        (toys.config("taylor_seer", cache_interval=4 if odd else 3), {}),
        (toys.config("first_block", threshold=0.1 if odd else 0.2), {}),
        (toys.config("mag_cache" if odd else "first_block"), {}),
        (toys.config("mag_cache"), {"name": "cond" if odd else "uncond"}),
    ]
    errors = []
    for config, context in cases:
        target = toys.Model()
        with fastcache.enable(target, config, process_group=dist.group.WORLD) as cache:
            try:
                toys.run(cache, target, toys.inputs(2), **context)
                errors.append("")
            except RuntimeError as error:
                errors.append(str(error))
    for method in ("mag_cache", "taylor_seer", "first_block"):  # equal ones go through afterwards
        target = toys.Model()
        with fastcache.enable(target, toys.config(method), process_group=dist.group.WORLD) as cache:
            toys.run(cache, target, toys.inputs(), num_inference_steps=toys.STEPS)
            errors.append(f"{method} {len(cache.stats)}")
    return errors


def die(rank: int, world: int) -> tuple[str, float]:
    """The last rank dies in mid-run; the others say what happened to them and how long it took."""
    target, calls = toys.Model(), toys.inputs()
    with fastcache.enable(
        target, toys.config("first_block"), process_group=dist.group.WORLD
    ) as cache:
        toys.run(cache, target, calls[:3])
        if rank == world - 1:
            os._exit(1)
        began = time.monotonic()
        try:
            toys.run(cache, target, calls[3:])
        except RuntimeError as error:
            return str(error), time.monotonic() - began
    return "", 0.0


# --- the tests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_different_data_decide_alike_and_by_the_global_metric(world, tmp_path):
    ranks = together(world, "decide", tmp_path)
    parted = 0
    for seed in range(RUNS):
        shared = [found[seed][0] for found in ranks]
        assert all(s == shared[0] for s in shared), "the ranks decided differently"
        whole = first_block(shards(seed, world), seed, None)
        assert [a for a, _ in shared[0]] == [a for a, _ in whole]
        for (_, ours), (_, theirs) in zip(shared[0], whole, strict=True):
            assert ours is theirs is None or ours == pytest.approx(theirs, rel=1e-4)
        own = [[a for a, _ in found[seed][1]] for found in ranks]
        parted += any(o != own[0] for o in own)
    assert parted > RUNS // 10, "the data never made a rank want something else: nothing was tested"


def test_ranks_decide_alike_by_every_signal_and_as_over_the_whole_batch(tmp_path):
    ranks = together(2, "named", tmp_path)
    for method in NAMED:
        reused = computed = 0
        for seed, shared in enumerate(ranks[0][method]):
            assert ranks[1][method][seed] == shared, method
            actions = [action for action, _ in shared]
            reused, computed = reused + actions.count("reuse"), computed + actions.count("compute")
            if method == "sea":  # a mean over latents, of which each rank has its own
                continue
            whole = one_named(method, toys.inputs(12, seed, batch=2), None)
            assert actions == [action for action, _ in whole]
            for (_, ours), (_, theirs) in zip(shared, whole, strict=True):
                assert ours is theirs is None or ours == pytest.approx(theirs, rel=1e-4)
        assert reused > 5 and computed > 5


def test_a_rank_without_a_fact_has_all_of_them_compute(tmp_path):
    one, other = together(2, "vote", tmp_path)
    actions = [action for action, _ in one]
    assert actions == [action for action, _ in other]
    alone = [action for action, _ in one_named("sea", toys.inputs(12, batch=2, speed=0.02), None)]
    assert actions[:7] == alone[:7] and "reuse" in alone[7:9]
    assert actions[7:9] == ["compute", "compute"]


def test_the_first_rank_decides_for_all_and_exactly_as_it_would_alone(tmp_path):
    ranks, parted = together(2, "led", tmp_path), 0
    for shared, alone in ranks[0]:
        assert shared == alone
    for (first, _), (second, alone) in zip(*ranks, strict=True):
        assert first == second, "a rank does not follow"
        parted += [a for a, _ in alone] != [a for a, _ in second]
    assert parted > 2, "the data never made a rank want something else: nothing was tested"


def test_a_rank_that_follows_may_still_have_all_compute(tmp_path):
    one, other = together(2, "led vote", tmp_path)
    actions = [action for action, _ in one]
    assert actions == [action for action, _ in other]
    assert actions[7:9] == ["compute", "compute"] and "reuse" in actions


def test_ranks_with_different_plans_all_raise(tmp_path):
    for errors in together(2, "refuse", tmp_path):
        assert all("config" in e and "num_inference_steps" in e for e in errors[:-3]), errors
        assert errors[-3:] == ["mag_cache 10", "taylor_seer 10", "first_block 10"]


def test_a_dead_rank_is_an_error_within_the_deadline(tmp_path):
    ((message, seconds),) = together(2, "die", tmp_path, survivors=1)
    assert "process_group" in message and seconds < 2 * DEADLINE
