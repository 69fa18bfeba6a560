"""Which step a call is and where a run begins, asked of the tracker itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcache.runtime.context import Context
from fastcache.runtime.steps import RISES, StepTracker
from fastcache.storage.state import State


def forward(self: Any, hidden_states: Tensor, timestep: Any = None, guidance: Any = None) -> None:
    """The signature of a model."""


def tracker(ends: bool = False, of: Any = forward) -> StepTracker:
    return StepTracker(of, ends)


def state(index: int = 0, timestep: float | None = None, total: int | None = None) -> State:
    made = State((0, "cond"), 1)
    made.index, made.timestep, made.total = index, timestep, total
    return made


def call(**fields: Any) -> Context:
    return Context(None, "cond", **fields)


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
    assert tracker(of=space["forward"]).argument((0, 5.0), {}) == 5.0


def test_a_model_without_a_timestep_has_none():
    def plain(self: Any, hidden_states: Tensor) -> None: ...

    steps = tracker(of=plain)
    assert steps.argument((torch.zeros(1), 3.0), {}) is None
    assert steps.read(state(), call(), (torch.zeros(1),), {}) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (2.5, 2.5),
        (torch.tensor(4.0), 4.0),
        (torch.tensor([5.0, 6.0]), 5.0),
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
    assert tracker().number(value, None) == number


def test_a_timestep_of_a_device_is_read_only_where_nothing_else_tells_runs_apart(monkeypatch):
    read: list[Tensor] = []
    monkeypatch.setattr("fastcache.sync.scalar", lambda value: read.append(value) or 1.0)
    there = torch.zeros(1, device="meta")  # as good as an accelerator's: not on the CPU
    assert tracker().number(there, 28) is None  # the length is known
    assert tracker(ends=True).number(there, None) is None  # the pipeline says when a run ends
    assert not read
    assert tracker().number(there, None) == 1.0 and read == [there]


def test_nothing_is_read_where_the_context_gives_the_step():
    assert tracker().read(state(), call(step_index=3), (0, 500.0), {}) is None
    assert tracker().read(state(), call(), (0, 500.0), {}) == 500.0


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
    assert steps.index(state(0), call(), None) == (0, False)
    assert steps.index(state(3), call(), None) == (3, False)


def test_a_step_index_is_taken_as_it_is():
    steps = tracker()
    assert steps.index(state(0), call(step_index=0), None) == (0, False)
    assert steps.index(state(0), call(step_index=7), None) == (7, False)  # a run may begin late
    assert steps.index(state(3), call(step_index=3), None) == (3, False)
    assert steps.index(state(3), call(step_index=5), None) == (5, False)  # and leave steps out


@pytest.mark.parametrize("goes_back_to", [0, 1])
def test_a_step_index_that_goes_back_begins_a_run(goes_back_to):
    found = tracker().index(state(4), call(step_index=goes_back_to), None)
    assert found == (goes_back_to, True)


def test_the_same_step_index_twice_is_another_branch():
    with pytest.raises(ValueError, match="step_index 3 came twice"):
        tracker().index(state(4), call(step_index=3), None)
    # the first step twice is a run of one step, and the next one
    assert tracker().index(state(1), call(step_index=0), None) == (0, True)


def test_a_run_of_known_length_ends_with_its_last_step():
    steps = tracker()
    assert steps.index(state(3, total=4), call(), None) == (3, False)
    assert steps.index(state(4, total=4), call(), None) == (0, True)
    assert steps.index(state(2), call(num_inference_steps=2), None) == (0, True)


# --- time -----------------------------------------------------------------------------------------


def test_a_run_begins_where_time_turns_back():
    steps = tracker()
    assert steps.index(state(2, timestep=500.0), call(), 400.0) == (2, False)
    assert steps.index(state(2, timestep=500.0), call(), 1000.0) == (0, True)


def test_time_that_stands_still_or_is_unknown_begins_no_run():
    steps = tracker()
    assert steps.index(state(2, timestep=500.0), call(), 500.0) == (2, False)
    assert steps.index(state(2, timestep=500.0), call(), None) == (2, False)
    assert steps.index(state(2), call(), 500.0) == (2, False)


def test_time_is_asked_before_the_length_is():
    """More calls than were planned, while time still falls: the run goes on."""
    assert tracker().index(state(4, timestep=500.0, total=4), call(), 400.0) == (4, False)


def test_time_that_rises_is_learnt_from_runs_of_one_step():
    """A model whose time grows looks like one new run after another."""
    steps, one = tracker(), state(1)
    begun = []
    for i in range(RISES + 2):
        one.timestep = 0.1 * i
        begun.append(steps.index(one, call(), 0.1 * (i + 1))[1])
    assert begun == [True] * (RISES - 1) + [False] * 3
    assert steps.ascending and steps.backwards(0.9, 0.0) and not steps.backwards(0.0, 0.9)
    steps.clear()
    assert not steps.ascending and steps.backwards(0.0, 0.9)


def test_whole_runs_do_not_teach_that_time_rises():
    steps = tracker()
    for _ in range(RISES + 2):
        for index, (before, now) in enumerate([(900.0, 600.0), (600.0, 300.0)]):
            assert not steps.index(state(index + 1, timestep=before), call(), now)[1]
        assert steps.index(state(3, timestep=300.0), call(), 900.0)[1]
    assert not steps.ascending
