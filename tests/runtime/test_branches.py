# SPDX-License-Identifier: Apache-2.0
"""Which branch of guidance a call without a context is, asked of the detector itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcache.runtime.branches import MOST, BranchDetector


def step(number: int) -> tuple[Tensor, Tensor]:
    """Latents and a timestep, new ones per step."""
    return torch.full((2, 3), float(number)), torch.tensor([1000.0 - number])


COND, UNCOND, THIRD = torch.ones(4), torch.zeros(4), torch.full((4,), 0.5)


def test_one_call_per_step_is_one_branch():
    branches = BranchDetector()
    assert [branches.of(*step(i), [COND]) for i in range(4)] == [0] * 4


def test_the_same_latents_under_other_conditions_are_another_branch():
    branches = BranchDetector()
    for i in range(3):
        latents, timestep = step(i)
        assert [branches.of(latents, timestep, [c]) for c in (COND, UNCOND)] == [0, 1]


def test_a_branch_keeps_its_number_in_whatever_order_it_comes():
    branches = BranchDetector()
    latents, timestep = step(0)
    assert [branches.of(latents, timestep, [c]) for c in (COND, UNCOND, THIRD)] == [0, 1, 2]
    latents, timestep = step(1)
    assert [branches.of(latents, timestep, [c]) for c in (THIRD, COND, UNCOND)] == [2, 0, 1]
    assert branches.of(*step(2), [UNCOND]) == 1  # guidance that leaves one out for a while


def test_equal_copies_are_the_same_conditions_on_the_cpu():
    branches = BranchDetector()
    latents, timestep = step(0)
    assert branches.of(latents, timestep, [COND]) == 0
    assert branches.of(latents.clone(), timestep.clone(), [UNCOND.clone()]) == 1
    assert branches.of(*step(1), [UNCOND.clone()]) == 1


def test_conditions_that_are_written_into_are_new_ones():
    branches, mine = BranchDetector(), torch.ones(4)
    latents, timestep = step(0)
    assert branches.of(latents, timestep, [mine]) == 0
    mine.add_(1)
    assert branches.of(latents, timestep, [mine]) == 1


def test_conditions_may_lie_in_lists_and_dicts():
    branches = BranchDetector()
    latents, timestep = step(0)
    for conditions, number in (([{"a": [COND]}], 0), ([{"a": [UNCOND]}], 1), ([{"a": [COND]}], 0)):
        assert branches.of(latents, timestep, conditions) == number


def test_numbers_and_words_are_conditions_too():
    branches = BranchDetector()
    latents, timestep = step(0)
    assert [branches.of(latents, timestep, [scale, None, "x"]) for scale in (1.0, 7.5)] == [0, 1]


def test_other_latents_at_one_timestep_are_another_step():
    """Two requests of a server that names neither: not two branches of one."""
    branches = BranchDetector()
    _, timestep = step(0)
    assert branches.of(torch.zeros(2), timestep, [COND]) == 0
    assert branches.of(torch.ones(2), timestep, [UNCOND]) == 0


def test_conditions_that_change_with_every_step_stay_one_branch():
    branches = BranchDetector()
    assert [branches.of(*step(i), [torch.full((4,), float(i))]) for i in range(5)] == [0] * 5


def test_an_argument_that_cannot_be_compared_is_another_argument():
    class Awkward:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("do not compare me")

        __hash__ = None  # type: ignore[assignment]

    branches = BranchDetector()
    latents, timestep = step(0)
    assert [branches.of(latents, timestep, [Awkward()]) for _ in range(2)] == [0, 1]


def test_more_branches_than_are_told_apart_share_the_last_one():
    branches = BranchDetector()
    latents, timestep = step(0)
    numbers = [branches.of(latents, timestep, [i]) for i in range(MOST + 3)]
    assert numbers == [*range(MOST + 1), MOST, MOST]


def test_forgetting_begins_with_the_first_branch():
    branches = BranchDetector()
    latents, timestep = step(0)
    assert [branches.of(latents, timestep, [c]) for c in (COND, UNCOND)] == [0, 1]
    branches.clear()
    assert branches.of(latents, timestep, [UNCOND]) == 0


@pytest.mark.parametrize("guided", [False, True])
def test_tensors_of_inference_mode_are_compared_by_value(guided):
    with torch.inference_mode():
        latents, timestep = step(0)
        conditions = [COND.clone(), (UNCOND if guided else COND).clone()]
        branches = BranchDetector()
        assert [branches.of(latents, timestep, [c]) for c in conditions] == [0, int(guided)]
