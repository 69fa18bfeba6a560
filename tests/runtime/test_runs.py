# SPDX-License-Identifier: Apache-2.0
"""Where a call belongs: frames, generations, announcements, the steps of a request, and the runs that follow."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache.models.pipeline import Schedule
from fastcache.recipe import Recipe
from fastcache.runtime.announce import Announcer
from fastcache.runtime.context import Context
from fastcache.runtime.frames import OWN, innermost, request_of, thread_request, when_thread_ends
from fastcache.runtime.generation import Generation, fresh
from fastcache.runtime.runs import Runs, abandon
from fastcache.runtime.settings import Settings
from fastcache.runtime.steps import Moment, moment_of
from fastcache.runtime.trip import LONG, Trip
from fastcache.storage.pool import Slots
from fastcache.storage.state import State


class Owner:
    """A cache as frames see it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.told: list[tuple[str, Any, bool]] = []

    def prepare(self, frame: Any) -> bool:
        return True

    def commit_prepared(self, frame: Any, failed: bool) -> None:
        self.told.append(("context", frame.request, failed))

    def ended(self, generation: Any, failed: bool) -> None:
        self.told.append(("run", generation.request, failed))


@pytest.fixture
def owner() -> Owner:
    return Owner()


def in_thread(work: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


# --- frames --------------------------------------------------------------------------------------


def test_nothing_is_open_outside(owner):
    assert innermost(owner) is None and request_of(owner) == 0
    with Context(owner, "cond"):
        assert innermost(owner).name == "cond"
    assert innermost(owner) is None


def test_each_cache_sees_its_own_frames(owner):
    other, outer, inner = Owner(), Context(owner, "a"), Context(owner, "b")
    foreign = Context(other, "c", request="else")
    with outer, foreign, inner:
        assert innermost(owner) is inner and innermost(other) is foreign
        assert inner.within(outer) and inner.within(foreign) and not outer.within(inner)
        assert request_of(owner) == 0 and request_of(other) == "else"


def test_a_context_without_a_request_has_that_of_the_generation_around(owner):
    context = Context(owner, "cond", step_index=0)
    with Generation(owner, "job"):
        with context:
            assert context.request == "job" and context.generation.request == "job"
        with Context(owner, "cond", request="other"):
            assert request_of(owner) == "other"
    with context:  # it is asked anew each time
        assert context.request == 0 and context.generation is None


def test_a_context_does_not_hand_its_request_to_one_inside(owner):
    inner = Context(owner, "uncond")
    with Context(owner, "cond", request="mine"), inner:
        assert inner.request == 0


def test_own_is_a_number_for_whoever_looks():
    assert OWN == 0 and isinstance(OWN, int) and Context(None).asked is OWN


def test_a_frame_that_fails_is_closed_and_told(owner):
    with pytest.raises(RuntimeError), Generation(owner, "job"), Context(owner, "cond"):
        raise RuntimeError
    assert owner.told == [("context", "job", True), ("run", "job", True)]
    assert innermost(owner) is None


# --- threads -------------------------------------------------------------------------------------


def test_every_thread_has_a_request_of_its_own():
    one, two = in_thread(thread_request), in_thread(thread_request)
    assert thread_request() == 0 and 0 not in (one, two) and one != two
    assert in_thread(lambda: thread_request() == thread_request())


def test_a_frame_is_of_the_thread_that_opened_it(owner):
    with Context(owner, "cond", request="mine"):
        assert in_thread(lambda: innermost(owner)) is None
        assert in_thread(lambda: request_of(owner)) not in (0, "mine")


def test_the_end_of_a_thread_is_told_and_that_of_the_main_one_never():
    ended: list[Any] = []
    when_thread_ends(ended.append)
    request = in_thread(lambda: when_thread_ends(ended.append) or thread_request())
    gc.collect()
    assert ended == [request]


# --- generations ---------------------------------------------------------------------------------


def test_a_generation_inside_another_has_a_request_of_its_own(owner):
    with Generation(owner) as outer, Generation(owner) as inner:
        assert outer.request == 0 and inner.request not in (0, OWN)
        assert innermost(owner) is inner and inner.serial != outer.serial
    with Context(owner, "cond", request="mine"), Generation(owner) as within:
        assert within.request == "mine"


def test_requests_made_for_a_run_are_different():
    assert len({fresh() for _ in range(5)}) == 5


def test_another_loop_is_another_run(owner):
    with Generation(owner, schedule=Schedule(SimpleNamespace())) as generation:
        first = generation.serial
        assert generation.total("transformer") is None and not generation.loops
        generation.loop(7)
        assert generation.serial > first and generation.loops
        assert generation.total("transformer") == 7
    with Generation(owner, num_inference_steps=9) as generation:
        generation.loop(7)
        assert generation.total("transformer") == 9  # what was said holds


def test_ticks_count_what_the_pipeline_moves_on(owner):
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(_step_index=None, order=1))
    generation = Generation(owner, schedule=Schedule(pipeline))
    assert [generation.tick(), generation.tick()] == [0, 0]  # two branches of one step
    pipeline.scheduler._step_index = 1
    assert [generation.tick(), generation.tick()] == [1, 1]
    generation.loop(None)
    assert generation.tick() == 0
    assert generation.evaluations == 1 and generation.step_of(3) == 3
    assert Generation(owner).tick() is None and Generation(owner).evaluations == 1


# --- announcements -------------------------------------------------------------------------------


class Pipe:
    """A pipeline with a progress bar, as diffusers has them."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, steps: int, chunks: int = 1) -> str:
        for _ in range(chunks):
            self.progress_bar(total=steps)
            frame = innermost(self.cache)
            self.seen.append((frame.generation.serial, frame.total("transformer")))
        return "image"

    def progress_bar(self, iterable: Any = None, total: Any = None) -> Any:
        return iterable


class Loops(Owner):
    def loop(self, steps: int | None) -> None:
        innermost(self).loop(steps)


def test_a_pipeline_announces_its_calls_and_loops():
    pipe, cache = Pipe(), Loops()
    pipe.cache = cache
    announcer = Announcer(pipe, cache)
    announcer.put_on()
    assert type(pipe) is not Pipe and isinstance(pipe, Pipe) and type(pipe).__name__ == "Pipe"
    assert pipe(4, chunks=2) == "image"
    (one, steps), (two, _) = pipe.seen
    assert one != two and steps == 4
    assert cache.told == [("run", 0, False)]
    with pytest.raises(TypeError):
        pipe()  # too few arguments: the run has failed
    assert cache.told[-1] == ("run", 0, True)
    announcer.take_off()
    assert type(pipe) is Pipe and set(vars(pipe)) == {"seen", "cache"}


def test_two_pipelines_of_one_class_share_what_was_made_of_it():
    one, two, cache = Pipe(), Pipe(), Loops()
    for pipe in (one, two):
        Announcer(pipe, cache).put_on()
    assert type(one) is type(two)


def test_an_announcer_takes_off_only_what_is_its_own():
    pipe = Pipe()
    first, second = Announcer(pipe, Loops()), Announcer(pipe, Loops())
    first.put_on()
    made = type(pipe)
    second.take_off()
    assert type(pipe) is made
    first.take_off()
    assert type(pipe) is Pipe


def test_an_object_whose_class_cannot_be_exchanged_is_left_alone():
    class Slotted:
        __slots__ = ("model",)

    pipe = Slotted()
    announcer = Announcer(pipe, Loops())
    with_dict = SimpleNamespace(pipe=pipe)
    announcer.put_on()
    assert type(with_dict.pipe) is Slotted


# --- the steps of a request ----------------------------------------------------------------------


def at(time: Any, mark: Any = None, evaluation: int | None = None) -> Moment:
    return moment_of(time, time if mark is None else mark, evaluation)


def state_of(trip: Trip, name: str) -> State:
    state = State((trip.request, name), 1)
    state.trip = trip
    return state


def called(trip: Trip, state: State, moment: Moment) -> int:
    left_out = trip.left_out(state, moment)
    if moment.place is not None:
        state.place, state.passed = moment.place, trip.passed
    state.index += 1 + left_out
    return left_out


def test_unnamed_calls_at_one_mark_belong_to_one_step():
    trip = Trip(0)
    assert [trip.again(at(t)) for t in (9.0, 9.0, 8.0)] == [False, True, False]
    assert trip.again(Moment()) is None  # nothing tells
    assert trip.again(at(8.0)) is False
    assert trip.again(at(8.0, evaluation=1)) is False  # another evaluation of the solver


def test_a_context_in_place_of_one_that_nobody_opens_is_made_once():
    trip = Trip("job")
    first, second = trip.context("default", 0), trip.context("default", 1)
    assert (first.name, second.name) == ("default", "default#2")
    assert first.request == second.request == "job"
    assert trip.context("default", 1) is second and trip.context("window", 0).name == "window"


def test_steps_that_a_branch_was_left_out_of_are_counted():
    trip = Trip(0)
    cond, uncond = state_of(trip, "cond"), state_of(trip, "uncond")
    for t in (10.0, 9.0):
        assert called(trip, cond, at(t)) == called(trip, uncond, at(t)) == 0
    for t in (8.0, 7.0, 6.0):
        assert called(trip, cond, at(t)) == 0
    called(trip, cond, at(5.0))
    assert called(trip, uncond, at(5.0)) == 3


def test_branches_that_never_shared_a_step_have_left_nothing_out():
    trip = Trip(0)
    one, two = state_of(trip, "one"), state_of(trip, "two")
    for t in (10.0, 8.0, 6.0):
        assert called(trip, one, at(t)) == 0 and called(trip, two, at(t - 1)) == 0


def test_a_mark_that_is_no_number_counts_nothing():
    trip = Trip(0)
    state = state_of(trip, "cond")
    assert called(trip, state, moment_of(None, "now")) == 0 and not trip.places
    assert called(trip, state, Moment()) == 0


def test_places_do_not_grow_without_end():
    trip = Trip(0)
    state = state_of(trip, "cond")
    for i in range(LONG + 5):
        called(trip, state, at(float(i)))
    assert len(trip.places) <= LONG


def test_another_loop_forgets_branches():
    trip = Trip(0)
    trip.enter(1)
    trip.again(at(9.0))
    trip.places[9.0] = None
    trip.enter(1)
    assert trip.places
    trip.enter(2)
    assert not trip.places and trip.again(at(9.0)) is False


# --- runs ----------------------------------------------------------------------------------------


class Timed(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Any = None, skip: Any = None) -> Tensor:
        return hidden_states


def runs(name: str = "Timed", **more: Any) -> tuple[Runs, Settings]:
    settings, pool = more.pop("settings", None) or Settings(), Slots([1])
    settings.pools.append(pool)
    recipe = more.pop("recipe", Recipe(fastcache.Interval(2)))
    adapter = fastcache.BlockAdapter(**more)
    return Runs(settings, name, Timed().eval(), recipe, adapter, pool, ()), settings


def locate(of: Runs, time: float, frame: Any = None, **more: Any) -> tuple[State, Any]:
    kwargs = {"hidden_states": torch.zeros(1, 2, 4), "timestep": time, **more}
    with torch.no_grad():
        state, step = of.locate(frame, (), kwargs)
    state.index = step.index + 1  # as `commit` does
    return state, step


def test_calls_of_one_run_are_one_state_and_count_up():
    of, _ = runs()
    found = [locate(of, t) for t in (1000.0, 800.0, 600.0)]
    assert [step.index for _, step in found] == [0, 1, 2]
    assert len({id(state) for state, _ in found}) == 1 and found[0][0].key == (0, "default")
    assert [step.timestep for _, step in found] == [1000.0, 800.0, 600.0]


def test_a_run_begins_where_time_turns_back_and_where_the_shape_changes():
    of, _ = runs()
    for t in (1000.0, 800.0, 600.0):
        locate(of, t)
    assert locate(of, 1000.0)[1].index == 0
    locate(of, 800.0)
    assert locate(of, 600.0, hidden_states=torch.zeros(1, 3, 4))[1].index == 0
    assert [run.key for run in of.pool.ended] == [(0, "default"), (0, "default")]


def test_threads_that_nobody_named_are_requests_and_go_with_their_thread():
    of, _ = runs()
    locate(of, 1000.0)
    key = in_thread(lambda: locate(of, 1000.0)[0].key)
    assert key[0] != 0 and set(of.pool.states) == {(0, "default"), key}
    gc.collect()
    of.add(("next", "cond"))
    assert key not in of.pool.states and (0, "default") in of.pool.states


def test_a_call_with_an_argument_that_always_computes_is_of_the_same_run():
    of, _ = runs(always_compute=("skip",))
    state, step = locate(of, 1000.0)
    assert not step.compute
    other, step = locate(of, 800.0, skip=torch.ones(3))
    assert step.compute and step.index == 1 and other is state
    with torch.no_grad():  # by its place as well
        _, step = of.locate(None, (torch.zeros(1, 2, 4), 600.0, [1]), {})
    assert step.compute
    assert not locate(of, 400.0, skip=None)[1].compute


def test_a_context_that_computes_says_so():
    of, _ = runs()
    owner = Owner()
    with Context(owner, "cond", step_index=0, compute=True) as _:
        _, step = locate(of, 1000.0, innermost(owner))
    assert step.compute and step.index == 0


def test_what_nothing_tells_apart_is_doubted_and_said_once():
    of, settings = runs()
    owner = Owner()
    for t in (1000.0, 1000.0, 800.0):
        with Context(owner, "cond"):
            state, _ = locate(of, t, innermost(owner))
            state.timelines[0].push(state.index)
    assert len(settings.notices.waiting) == 1
    assert "called more than once at one step in context 'cond'" in settings.notices.waiting[0]
    assert len(state.timelines[0].steps) == 1  # each call of the rest of the run finds nothing
    assert state.unclear
    with Context(owner, "cond"):
        assert locate(of, 1000.0, innermost(owner))[1].index == 0
    assert not state.unclear  # but the next run does


def test_a_context_around_two_branches_gives_each_a_state():
    of, _ = runs()
    owner = Owner()
    keys = []
    for t in (1000.0, 800.0):
        with Context(owner, "guidance"):
            for condition in ("a cat", "nothing"):
                state, step = locate(of, t, innermost(owner), skip=condition)
                keys.append((state.key[1], step.index))
    assert keys == [("guidance", 0), ("guidance#2", 0), ("guidance", 1), ("guidance#2", 1)]


def test_an_announced_run_begins_at_once_with_its_length():
    of, _ = runs()
    owner = Owner()
    for t in (1000.0, 800.0):
        locate(of, t)
    with Generation(owner, 0, num_inference_steps=5):
        state, step = locate(of, 600.0, innermost(owner))  # where time alone would go on
        assert step.index == 0 and step.total == state.total == 5
        assert locate(of, 400.0, innermost(owner))[1].index == 1


def test_the_recipe_tells_the_length_where_nobody_else_does():
    of, _ = runs(recipe=Recipe(fastcache.Magnitude(num_inference_steps=7, mag_ratios=[1.0])))
    assert locate(of, 1000.0)[1].total == 7


def test_the_second_expert_begins_where_the_first_has_stopped():
    first, settings = runs("transformer")
    second, _ = runs("transformer_2", settings=settings)
    owner = Owner()
    for i, of in enumerate((first, first, second, second)):
        with Context(owner, "cond", step_index=i, num_inference_steps=4):
            state, step = locate(of, 1000.0 - i, innermost(owner))
            state.index = step.index + 1
        assert (step.index, step.total) == ((i, 4) if of is first else (i - 2, 2))
    assert [run.key for run in first.pool.ended] == [(0, "cond")]


def test_an_exception_gives_up_the_runs_of_one_request():
    of, settings = runs()
    owner = Owner()
    for request in ("good", "bad"):
        for t in (1000.0, 800.0):
            with Context(owner, "cond", request=request):
                locate(of, t, innermost(owner))
    abandon(settings.pools, "bad")
    assert {key[0]: state.index for key, state in of.pool.states.items()} == {"good": 2, "bad": 0}


def test_a_reset_forgets_one_request_or_all():
    of, _ = runs()
    for request in (1, 2, 3):
        of.pool.adopt(of.add((request, "cond")), ("s",))
    of.steps.ascending = True
    of.reset(2)
    assert [key[0] for key in of.pool.states] == [1, 3] and of.steps.ascending
    of.reset()
    assert not of.pool.states and not of.steps.ascending


def test_a_trip_lives_as_long_as_a_state_of_it():
    of, _ = runs()
    state = of.add(("job", "cond"))
    assert of.add(("job", "uncond")).trip is state.trip is of.trips.of("job")
    trip = weakref.ref(state.trip)
    del state
    of.reset("job")
    gc.collect()
    assert trip() is None


# --- the whole way -------------------------------------------------------------------------------


def test_disabling_an_old_cache_again_does_not_touch_a_new_one():
    class Pipeline:
        def __init__(self) -> None:
            self.transformer = toys.Model()

        def __call__(self) -> list[Tensor]:
            return toys.plain(self.transformer, toys.inputs(4))

    pipe = Pipeline()
    old = fastcache.enable(pipe, Recipe(fastcache.Interval(2)))
    old.disable()
    with fastcache.enable(pipe, Recipe(fastcache.Interval(2))) as cache:
        old.disable()
        pipe()
        pipe()
        assert [r.step for r in cache.stats] == [0, 1, 2, 3] * 2
    assert type(pipe) is Pipeline and set(vars(pipe)) == {"transformer"}


def test_what_a_cache_announces_is_what_its_runs_see():
    target = toys.Model()
    with fastcache.enable(target, Recipe(fastcache.Interval(2))) as cache:
        with cache.run("job", num_inference_steps=3):
            toys.run(cache, target, toys.inputs(3))
        assert [(r.request, r.step) for r in cache.stats] == [("job", i) for i in range(3)]
        assert not cache.denoisers[0].pool.states  # forgotten at its end
        assert toys.actions(cache) == "C.C"


def test_after_a_reset_a_run_is_in_no_doubt_though_it_looks_like_one_before():
    """Its conditions are those of the run before the last."""
    target = toys.build("faster_guided")
    one, two = (toys.inputs_for("faster_guided", seed=seed) for seed in (0, 9))
    with fastcache.enable(target, Recipe(fastcache.Interval(2))) as cache:
        for calls in (one, two):
            toys.plain(target, calls)
        cache.reset()
        cache.stats.clear()
        toys.plain(target, one)
        assert toys.actions(cache) == 5 * "C."
