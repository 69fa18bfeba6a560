# SPDX-License-Identifier: Apache-2.0
"""What a rule keeps beside its histories: slots that have an owner, a place in memory and an end."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from fastcache.storage.group import SlotGroup
from fastcache.storage.history import Timeline
from fastcache.storage.ring import Ring
from fastcache.storage.state import State


class Inner(SlotGroup):
    __slots__ = ("count", "value")
    holds = ("value",)
    facts: ClassVar[dict[str, Any]] = {"count": 0}
    value: Any
    count: int


class Outer(SlotGroup):
    __slots__ = ("inner", "other", "ring", "row")
    holds = ("row",)
    parts = ("inner", "ring", "other")
    inner: Inner
    other: Any
    ring: Any
    row: Any


@pytest.fixture
def group() -> Outer:
    made = Outer(inner=Inner())
    made.row, made.inner.value = torch.ones(3), torch.ones(2)
    made.ring = Ring(torch.ones(2), Timeline(2))
    made.ring.buffer.fill_(1.0)
    made.inner.count = 4
    return made


def kinds() -> list[type[SlotGroup]]:
    """Every kind of slots that the package has."""
    import fastcache  # noqa: F401

    found, waiting = [], [SlotGroup]
    while waiting:
        more = waiting.pop().__subclasses__()
        waiting += more
        found += [kind for kind in more if kind.__module__.startswith("fastcache.")]
    return found


def test_nothing_is_held_before_it_is_allocated():
    empty = Outer(inner=Inner())
    assert not empty.tensors() and empty.kept == () and empty.inner.kept == ()
    assert empty.row is None and empty.ring is None and empty.inner.count == 0


def test_the_tensors_of_parts_are_counted_with_the_others(group):
    state = State((0, "a"), 1)
    state.slots = [group]
    assert len(state.tensors()) == 3 and state.nbytes() == 4 * (3 + 2 + 4)


def test_a_run_that_begins_finds_the_same_tensors_empty(group):
    state = State((0, "a"), 1)
    state.slots = [group]
    before = [t.data_ptr() for t in state.tensors()]
    state.restart()
    assert [t.data_ptr() for t in state.tensors()] == before
    assert not any(t.any() for t in state.tensors()) and group.inner.count == 0


def test_storage_that_moves_takes_its_values_and_its_rows_along(group):
    before = [t.data_ptr() for t in group.tensors()]
    state = State((0, "a"), 1)
    state.slots = [group]
    state.move(torch.clone)
    after = group.tensors()
    assert all(t.all() for t in after) and not {t.data_ptr() for t in after} & set(before)
    assert group.ring.views[0].data_ptr() == group.ring.buffer.data_ptr()


def test_every_tensor_has_a_name_by_which_it_can_be_replaced(group):
    places = {f"{label}.{n}": (o, n) for label, o in group.owners("rule0") for n in o.kept}
    assert list(places) == ["rule0.row", "rule0.inner.value", "rule0.ring.rows"]
    for owner, name in places.values():
        setattr(owner, name, torch.zeros_like(getattr(owner, name)))
    assert not any(t.any() for t in group.tensors()) and not group.ring.views[1].any()


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_slot_is_said_to_be_a_tensor_a_part_a_fact_or_a_form(kind):
    own = kind.__mro__[: kind.__mro__.index(SlotGroup)]
    said = {*kind.holds, *kind.parts, *kind.facts, *kind.forms}
    assert {name for each in own for name in each.__slots__} == said
    assert not hasattr(kind(), "__dict__")
