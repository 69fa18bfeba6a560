# SPDX-License-Identifier: Apache-2.0
"""Which step a call is and where a run begins, asked of the tracker itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcache.models.pipeline import Schedule
from fastcache.runtime.context import Context
from fastcache.runtime.generation import Generation
from fastcache.runtime.steps import (
    BEGINS,
    EVALUATION,
    NEVER,
    NEXT,
    TURNING,
    TURNS,
    UNCLEAR,
    Moment,
    StepTracker,
    moment_of,
)
from fastcache.storage.state import State


class Timed(nn.Module):
    """The signature of a model."""

    def forward(
        self, hidden_states: Tensor, timestep: Any = None, guidance: Any = None
    ) -> None: ...


def tracker(of: type[nn.Module] = Timed) -> StepTracker:
    return StepTracker(of())


def state(index: int = 0, timestep: float | None = None, total: int | None = None) -> State:
    made = State((0, "cond"), 1)
    made.index, made.timestep, made.mark, made.total = index, timestep, timestep, total
    made.records.extend(range(index))
    return made


def call(**fields: Any) -> Context:
    return Context(None, "cond", **fields)


def at(time: float | None) -> Moment:
    return NEVER if time is None else moment_of(time, time)


def index(steps: StepTracker, of: State, during: Context, time: float | None) -> tuple[int, str]:
    """As the runtime asks."""
    number, how = steps.index(of, during, None, at(time))
    if how == TURNING:
        how = steps.learn(of, time)
    return number, how


# --- the model's own timestep ---------------------------------------------------------------------


def test_the_timestep_is_found_by_name_or_by_place():
    steps, latents = tracker(), torch.zeros(1)
    assert steps.argument((latents,), {"timestep": 7}) == 7
    assert steps.argument((latents, 8), {}) == 8
    assert steps.argument((latents,), {}) is None
    assert steps.argument((latents, 8), {"timestep": 9}) == 9


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t", "time"])
def test_usual_names_of_the_timestep_are_known(name):
    space: dict[str, Any] = {}
    exec(f"def forward(self, x, {name}): ...", space)
    assert tracker(type("Named", (nn.Module,), space)).argument((0, 5.0), {}) == 5.0


def test_a_model_without_a_timestep_has_none():
    class Plain(nn.Module):
        def forward(self, hidden_states: Tensor) -> None: ...

    steps = tracker(Plain)
    assert steps.argument((torch.zeros(1), 3.0), {}) is None
    assert steps.moment(None, None, None) == NEVER


class Passes(nn.Module):
    """A wrapper that names nothing, such as PEFT's and DistributedDataParallel."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("deep", [1, 3])
def test_wrappers_are_looked_through(deep):
    model: nn.Module = Timed()
    for _ in range(deep):
        model = Passes(model)
    steps = StepTracker(model)
    assert steps.argument((0, 5.0), {}) == 5.0
    assert steps.argument((0,), {"timestep": 6.0}) == 6.0
    assert steps.first == "hidden_states"


def test_a_keyword_is_found_where_no_signature_names_it():
    assert StepTracker(Passes(nn.Identity())).argument((0,), {"timesteps": 6.0}) == 6.0


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (2.5, 2.5),
        (torch.tensor(4.0), 4.0),
        (torch.tensor([5.0, 6.0]), 6.0),
        (torch.tensor([[7]]), 7.0),
        (True, None),
        ("9", None),
        (None, None),
        (float("nan"), None),
        (float("inf"), None),
        (torch.tensor([]), None),
        (torch.tensor(float("nan")), None),
    ],
)
def test_a_timestep_is_a_finite_number_or_nothing(value, number):
    assert tracker().moment(None, None, value).time == number


def test_parts_with_timesteps_of_their_own_are_read_by_the_noisiest():
    """The first frame is pinned, in image-to-video and diffusion forcing."""
    steps = tracker()
    frames = [torch.tensor([[0.0, t, t]]) for t in (900.0, 600.0)]
    assert [steps.moment(None, None, f).time for f in frames] == [900.0, 600.0]
    steps.ascending = True
    assert steps.moment(None, None, torch.tensor([[1.0, 0.3, 0.3]])).time == pytest.approx(0.3)
    waiting = [torch.tensor([[t, 999.0]]) for t in (500.0, 400.0)]  # the last frame has not begun
    assert tracker().moment(None, None, waiting[0]) != tracker().moment(None, None, waiting[1])


def test_a_timestep_of_a_device_is_looked_at_unless_a_pipeline_tells_the_step(monkeypatch):
    read: list[Tensor] = []
    monkeypatch.setattr("fastcache.sync.extreme", lambda value, _: read.append(value) or (1.0, 1.0))
    there = torch.zeros(1, device="meta")  # as good as an accelerator's: not on the CPU
    pipe = pipeline([900.0, 800.0], _current_timestep=object())
    generation = Generation(None, "r", schedule=Schedule(pipe))
    assert tracker().moment(None, generation, there) == moment_of(None, 0, 0)
    assert tracker().moment(None, generation, there.clone()) == moment_of(None, 0, 0)
    pipe._current_timestep = object()
    assert tracker().moment(None, generation, there) == moment_of(None, 1, 1)
    assert tracker().moment(500.0, None, there).time == 500.0  # told
    assert not read
    assert tracker().moment(None, None, there).time == 1.0 and read == [there]
    assert tracker().moment(None, Generation(None, "r"), there).time == 1.0 and len(read) == 2


def test_views_of_all_timesteps_are_looked_at_once(monkeypatch):
    read: list[Any] = []
    monkeypatch.setattr(
        "fastcache.sync.numbers", lambda values: read.append(values) or [900.0, 800.0, 700.0]
    )
    steps, there = tracker(), torch.zeros(3, device="meta")
    assert [steps.moment(None, None, t.expand(2)).time for t in there] == [900.0, 800.0, 700.0]
    assert len(read) == 1
    there.add_(1)
    assert steps.moment(None, None, there[1]).time == 800.0 and len(read) == 2
    own: list[Tensor] = []
    monkeypatch.setattr("fastcache.sync.extreme", lambda value, _: own.append(value) or (1.0, 1.0))
    assert steps.moment(None, None, there[1] / 1000).time == 1.0 and len(own) == 1


# --- what was told --------------------------------------------------------------------------------


def test_the_callback_is_believed_before_the_context():
    steps = tracker()
    assert steps.told(call(timestep=3.0), None) == 3.0
    assert steps.told(call(timestep=3.0), lambda: 4.0) == 4.0
    assert steps.told(call(timestep=3.0), lambda: None) == 3.0
    assert steps.told(call(timestep=3.0), lambda: torch.tensor([5.0])) == 5.0
    assert steps.told(call(timestep=3.0), lambda: float("nan")) is None


def test_a_callback_that_returns_no_number_is_named():
    with pytest.raises(TypeError, match="current_timestep_callback returned 'soon'"):
        tracker().told(call(), lambda: "soon")


# --- the index ------------------------------------------------------------------------------------


def test_calls_are_counted_where_nothing_is_said():
    steps = tracker()
    assert index(steps, state(0), call(), None) == (0, NEXT)
    assert index(steps, state(3), call(), None) == (3, NEXT)


def test_a_step_index_is_taken_as_it_is():
    steps = tracker()
    assert index(steps, state(0), call(step_index=0), None) == (0, NEXT)
    assert index(steps, state(0), call(step_index=7), None) == (7, NEXT)  # a run may begin late
    assert index(steps, state(3), call(step_index=3), None) == (3, NEXT)
    assert index(steps, state(3), call(step_index=5), None) == (5, NEXT)  # and leave steps out


@pytest.mark.parametrize("goes_back_to", [0, 1])
def test_a_step_index_that_goes_back_begins_a_run(goes_back_to):
    found = index(tracker(), state(4), call(step_index=goes_back_to), None)
    assert found == (goes_back_to, BEGINS)


def test_the_same_step_index_twice_is_another_branch():
    with pytest.raises(ValueError, match="step_index 3 came twice"):
        index(tracker(), state(4), call(step_index=3), None)
    # the first step twice is a run of one step, and the next one; not so inside one context
    assert index(tracker(), state(1), call(step_index=0), None) == (0, BEGINS)
    around = call(step_index=0)
    around.calls = 1
    with pytest.raises(ValueError, match="step_index 0 came twice"):
        index(tracker(), state(1), around, None)


def test_a_run_of_known_length_ends_with_its_last_step():
    steps = tracker()
    assert index(steps, state(3, total=4), call(), None) == (3, NEXT)
    assert index(steps, state(4, total=4), call(), None) == (0, BEGINS)
    assert index(steps, state(2), call(num_inference_steps=2), None) == (0, BEGINS)
    assert index(steps, state(1, timestep=500.0, total=1), call(), 500.0) == (0, BEGINS)


# --- time -----------------------------------------------------------------------------------------


def test_a_run_begins_where_time_turns_back():
    steps = tracker()
    assert index(steps, state(2, timestep=500.0), call(), 400.0) == (2, NEXT)
    assert index(steps, state(2, timestep=500.0), call(), 1000.0) == (0, BEGINS)


def test_time_that_is_unknown_begins_no_run():
    steps = tracker()
    assert index(steps, state(2, timestep=500.0), call(), None) == (2, NEXT)
    assert index(steps, state(2), call(), 500.0) == (2, NEXT)


def test_a_second_call_at_one_step_may_be_anybodys():
    """Windows over one latent, a weaker model for guidance: the step is the same, the branch is not known."""
    assert index(tracker(), state(2, timestep=500.0), call(), 500.0) == (1, UNCLEAR)


def test_time_is_asked_before_the_length_is():
    """More calls than were planned, while time still falls: the run goes on."""
    assert index(tracker(), state(4, timestep=500.0, total=4), call(), 400.0) == (4, NEXT)


def test_time_that_rises_is_learnt_in_the_first_run():
    """A model whose time grows begins low; its steps count on, and compute until its direction is known."""
    steps, one = tracker(), state(1, timestep=0.0)
    seen = []
    for i in range(1, TURNS + 3):
        seen.append(index(steps, one, call(), 0.1 * i))
        one.index, one.timestep, one.mark = i + 1, 0.1 * i, 0.1 * i
    assert seen == [(i, TURNING if i < TURNS else NEXT) for i in range(1, TURNS + 3)]
    assert steps.ascending and steps.backwards(0.9, 0.0) and not steps.backwards(0.0, 0.9)
    assert index(steps, one, call(), 0.0) == (0, BEGINS)
    steps.clear()
    assert not steps.ascending and steps.backwards(0.0, 0.9)


def test_a_run_that_falls_in_a_model_whose_time_is_known_to_rise_is_seen_at_once():
    """By where it begins: at 1, the end of a run that rises."""
    rising = type("Lumina2Transformer2DModel", (Timed,), {})
    steps = tracker(rising)
    assert steps.ascending
    assert index(steps, state(1, timestep=1.0), call(), 0.9) == (1, NEXT)
    assert index(steps, state(2, timestep=0.9), call(), 0.8) == (2, NEXT)
    assert not steps.ascending


def test_a_sibling_knows_the_direction_once_one_branch_has_learnt_it():
    steps, one, other = tracker(), state(1, timestep=0.0), state(1, timestep=0.0)
    for i in range(1, TURNS + 2):
        for branch in (one, other):
            number, how = index(steps, branch, call(), 0.1 * i)
            assert number == i and how == (TURNING if i < TURNS else NEXT)
            branch.index, branch.timestep, branch.mark = i + 1, 0.1 * i, 0.1 * i


def test_a_run_of_one_step_does_not_turn_time_around():
    """Two requests of one step each: the second begins a run, where it starts high."""
    for before, now in ((500.0, 700.0), (100.0, 1000.0), (0.6, 0.7)):
        assert index(tracker(), state(1, timestep=before), call(), now) == (0, BEGINS)


def test_a_step_that_seemed_to_turn_time_was_the_first_of_a_run():
    steps, one = tracker(), state(1, timestep=200.0)
    assert index(steps, one, call(), 300.0) == (1, TURNING)
    one.index, one.timestep, one.mark = 2, 300.0, 300.0
    assert index(steps, one, call(), 250.0) == (0, BEGINS)


def test_whole_runs_do_not_teach_that_time_rises():
    steps = tracker()
    for _ in range(TURNS + 2):
        for number, (before, now) in enumerate([(900.0, 600.0), (600.0, 300.0)]):
            assert index(steps, state(number + 1, timestep=before), call(), now)[1] == NEXT
        assert index(steps, state(3, timestep=300.0), call(), 900.0)[1] == BEGINS
    assert not steps.ascending


# --- announced runs -------------------------------------------------------------------------------


def pipeline(times: list[float], order: int = 1, **facts: Any) -> Any:
    scheduler = SimpleNamespace(
        timesteps=torch.tensor(times), order=order, config=SimpleNamespace()
    )
    return SimpleNamespace(scheduler=scheduler, config=SimpleNamespace(), **facts)


def test_an_announced_run_begins_where_it_is_announced_and_nowhere_else():
    steps, generation = tracker(), Generation(None, "r")
    one = state(3, timestep=500.0)
    assert steps.index(one, call(), generation, at(400.0)) == (0, BEGINS)  # of an older run
    one.serial = generation.serial
    assert steps.index(one, call(), generation, NEVER) == (3, NEXT)
    generation.loop(None)
    assert steps.index(one, call(), generation, at(400.0)) == (0, BEGINS)


def test_the_direction_of_an_announced_run_is_seen_in_its_second_step():
    steps, generation = tracker(), Generation(None, "r")
    one = state(1, timestep=0.0)
    one.serial = generation.serial
    assert steps.index(one, call(), generation, at(0.1)) == (1, NEXT)
    one.index, one.timestep, one.mark = 2, 0.1, 0.1
    assert steps.index(one, call(), generation, at(0.2)) == (2, NEXT)
    assert steps.index(one, call(), generation, at(0.0)) == (0, BEGINS)  # chunks inside of it
    assert not steps.ascending  # it is the run's, not the model's


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_solver_of_second_order_counts_steps_not_calls(device):
    pipe = pipeline([1000.0, 800.0, 800.0, 500.0, 500.0], order=2, _num_timesteps=5)
    generation = Generation(None, "r", schedule=Schedule(pipe))
    assert generation.total("transformer") == 3 and generation.evaluations == 2
    steps, one, seen = tracker(), state(), []
    one.serial = generation.serial
    for t in pipe.scheduler.timesteps:
        pipe._current_timestep = t  # another object in every evaluation
        moment = steps.moment(None, generation, t.to(device))
        seen.append(steps.index(one, call(), generation, moment))
        one.index, one.mark, one.evaluation = seen[-1][0] + 1, moment.mark, moment.evaluation
    assert seen == [(0, NEXT), (1, NEXT), (1, EVALUATION), (2, NEXT), (2, EVALUATION)]


def test_two_experts_have_stretches_of_their_own():
    pipe = pipeline([1000.0, 900.0, 800.0, 500.0], transformer=1, transformer_2=2, _num_timesteps=4)
    pipe.config.boundary_ratio, pipe.scheduler.config.num_train_timesteps = 0.875, 1000
    generation = Generation(None, "r", schedule=Schedule(pipe))
    assert [generation.total(n) for n in ("transformer", "transformer_2")] == [2, 2]


def test_a_part_of_the_timesteps_is_a_whole_run():
    """Image-to-image at a strength below 1: the pipeline tells how many there are."""
    schedule = Schedule(pipeline([1000.0, 800.0, 600.0, 400.0], order=2, _num_timesteps=2))
    assert schedule.times() == [600.0, 400.0] and schedule.total("transformer") == 2
