# SPDX-License-Identifier: Apache-2.0
"""From what a call was seen to do, to the segments that a stack is cut into."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from ... import sync
from .layout import BlockList, Segment

ENTER, LEAVE = "enter", "leave"
Event = tuple[int, str]  # index of a list, and whether the model entered or left it


class Cut(NamedTuple):
    """Fields of a `Layout`."""

    order: tuple[int, ...]
    segments: tuple[Segment, ...]
    interleaved: bool


def continues_previous(left: Tensor, entered: Tensor) -> bool:
    """Whether one list goes on where the other stopped, perhaps with the text joined in front."""
    if left.shape == entered.shape:
        return sync.same(left, entered)
    joined = left.dim() == entered.dim() == 3 and entered.shape[1] > left.shape[1]
    return joined and sync.same(left, entered[:, -left.shape[1] :])


def alone(first: BlockList) -> bool:
    """Whether a list holds nothing but blocks that always run, and so belongs to no segment."""
    return not first.skips


def cut(
    lists: Sequence[BlockList],
    events: Sequence[Event],
    continuing: Collection[int],
    loop_does_more: bool,
    number: int,
) -> Cut:
    """Join lists whose blocks follow each other directly; the others get a residual of their own.

    events: as they happened in one call. continuing: lists that go on where the one before has stopped.
    number: of the first segment. Raises ValueError where the lists have no residual.
    """
    order = tuple(dict.fromkeys(at for at, _ in events))
    _refuse(lists, events, order)
    interleaved = list(events) != [(at, kind) for at in order for kind in (ENTER, LEAVE)]
    joined: list[tuple[int, ...]] = []
    for at in order:
        direct = at in continuing and not loop_does_more
        if joined and (interleaved or direct):
            joined[-1] = (*joined[-1], at)
        else:
            joined.append((at,))
    segments = tuple(Segment(number + i, members) for i, members in enumerate(joined))
    return Cut(order, segments, interleaved)


def _refuse(lists: Sequence[BlockList], events: Sequence[Event], order: tuple[int, ...]) -> None:
    """Raise where the model does not run its lists once each, from the first one on."""
    names, without = [each.name for each in lists], alone(lists[0])
    missing = [each.name for each in lists if each.skips and each.index not in order]
    if missing:
        raise ValueError(
            f"target: the model did not iterate over {missing}, so its blocks cannot be skipped; name the "
            "lists it does use with fastcache.BlockAdapter(blocks=...)"
        )
    if len(set(events)) != len(events):
        raise ValueError(
            f"target: the model runs the lists {names} more than once in a call, so "
            "they have no residual; use a module target, or name another list with "
            "fastcache.BlockAdapter(blocks=...)"
        )
    if lists[0].probed and not without and order[0] != 0:
        raise ValueError(
            f"target: the model runs {names[order[0]]} before {names[0]}; name the lists in the "
            "order they run with fastcache.BlockAdapter(blocks=...)"
        )
