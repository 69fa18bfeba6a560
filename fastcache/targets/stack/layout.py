# SPDX-License-Identifier: Apache-2.0
"""What is known of a stack: its lists beforehand, and how they run, learnt from a computed call.

A `Layout` is data. A recording call yields it whole, and nothing changes it afterwards: the next recording
call replaces it. Each of its fields says what one call has shown, so a later call can be held against it.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from torch import nn

from ...models.adapter import Block
from ...models.block_io import BlockIO, Positions
from ..control import StepControl
from ..decide import RuleDecider
from ..guide import Guide
from ..meters.base import Meter
from ..outputs import BARE, ReturnLayout
from .way import Way


class Entered(NamedTuple):
    """The streams with which a segment was entered. version: how often `hidden` had been written into."""

    hidden: Any
    encoder: Any
    version: int = -1


class Left(NamedTuple):
    """What the last block of a segment has returned: the streams, and other entries by their place."""

    hidden: Any
    encoder: Any
    extra: dict[int, Any]


# What a block returns beside the streams, by place, and the argument by which the next block gets it.
Carried = tuple[tuple[int, int | str], ...]


class Segment(NamedTuple):
    """Lists that have one residual in common, by their index, in the order in which they run."""

    number: int
    lists: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """What one list does in the layout.

    segment: number of its segment; -1 where it belongs to none. opens, closes: it is the first or the last
    list of its segment. opener: index of the list that opens it. returns: how its first block returns.
    positions: where the streams are in a returned tuple, if the model has shown it. carried: see `Carried`.
    """

    segment: int = -1
    opens: bool = False
    closes: bool = False
    opener: int = 0
    returns: ReturnLayout = BARE
    positions: Positions | None = None
    carried: Carried = ()


@dataclass(frozen=True)
class Layout:
    """How the lists of a stack run, as a recording call has seen it.

    order: lists by index, as the model enters them. segments: see `Segment`; numbers of an earlier cut are
    never used again, so that what was stored for that one is not taken for this one. places: one per list.
    interleaved: the lists take turns. loop_does_more: the model's loop does more than to call one block after
    the other. writes_inputs: some block writes into its input, so a copy of what enters is kept. used: numbers
    below this one belong to cuts before.
    """

    order: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    places: tuple[Place, ...] = ()
    interleaved: bool = False
    loop_does_more: bool = False
    writes_inputs: bool = False
    used: int = 0

    @cached_property
    def number(self) -> int:
        """Of the first segment, -1 without one: where it is stored, all segments of this cut are."""
        return self.segments[0].number if self.segments else -1

    @property
    def next_number(self) -> int:
        """The first number that no cut so far has used."""
        return self.segments[-1].number + 1 if self.segments else self.used

    @property
    def apart(self) -> bool:
        """Whether it is cut as a stack has to be whose loop does more."""
        return self.interleaved or all(len(segment.lists) == 1 for segment in self.segments)

    @property
    def key(self) -> tuple:
        """What a program that is compiled without guards has to know of it."""
        return self.next_number, self.loop_does_more, self.writes_inputs


class BlockList:
    """One list of blocks, and how its blocks are called.

    head, tail: how many of its first and of its last blocks always run. probed: the last one of the head is looked at.
    """

    def __init__(
        self,
        index: int,
        name: str,
        modules: nn.ModuleList,
        row: Block | None,
        ends: tuple[int, int] = (0, 0),
        probed: bool = False,
    ) -> None:
        self.index, self.name, self.modules, self.row = index, name, modules, row
        (self.head, self.tail), self.probed = ends, probed
        self.closing: Any = None  # what its last block runs too, a `Closing`
        self.loop_ends = (
            True  # a loop over it is expected to ask for what comes after the last block
        )
        self.known = self.blocks()
        self.count = len(self.known)
        self._ios: dict[type, BlockIO] = {}
        last = self.count - 1
        self.first_io, self.probed_io = self.io(0), self.io(max(self.head - 1, 0))
        # of the first and of the last block that a prediction stands in for
        self.replaced_io = self.io(min(self.head, last))
        self.last_io = self.io(max(last - self.tail, 0))

    @property
    def skips(self) -> bool:
        """Whether any of its blocks is ever skipped."""
        return self.count > self.head + self.tail

    @property
    def untailed(self) -> Sized:
        """As many as its blocks without those of the tail."""
        return range(len(self.modules) - self.tail) if self.tail else self.modules

    def __len__(self) -> int:
        return len(self.modules)

    def blocks(self) -> list[nn.Module]:
        """The blocks themselves; iterating over the list would be routed."""
        return list(self.modules._modules.values())

    def looked_at(self) -> nn.Module:
        """The last one of the head."""
        if self.head == 1:
            return next(iter(self.modules._modules.values()))
        return self.blocks()[self.head - 1]

    def changed(self) -> bool:
        """Whether blocks were added, taken away or exchanged since this was made."""
        return list(self.modules._modules.values()) != self.known

    def io(self, index: int) -> BlockIO:
        block = self.known[index]
        if type(block) not in self._ios:
            self._ios[type(block)] = BlockIO(block, self.row)
        return self._ios[type(block)]


class Stack(Protocol):
    """What the rooms of a stack read of it.

    rule: number of the recipe's rule. keeps_text: the text stream is read after the stack. guide: gives the
    weights where they come from this step's own blocks. decider: decides by the first block. meter: measures
    what is decided by, None where that is nothing inside the stack. every_step: a reused step is measured
    against too. measure: note the magnitude ratio of every residual. probed: the last block of the head is looked at.
    early: several blocks run before the decision. ordered: their number was asked for. tailed: blocks run
    after the segments. opening: what entered the first block, until it is looked at.
    way: how the running call goes through it, where it computes; None where that is not looked at.
    """

    rule: int
    control: StepControl
    keeps_text: bool
    guide: Guide | None
    meter: Meter | None
    every_step: bool
    measure: bool
    early: bool
    probed: bool
    ordered: bool
    tailed: bool
    opening: Any
    decider: RuleDecider
    way: Way | None

    def start_way(self) -> Way:
        """The step computes: see how it goes through the stack."""

    def refit(self, number: int, entered: Entered, left: Left) -> None:
        """Have storage for the residual of a segment as it is in this call."""


def spread(counts: Sequence[int], first: int, last: int) -> list[tuple[int, int]]:
    """How many blocks of each list always run, at its start and at its end: of `counts` blocks, the lists being one."""
    found, before, whole = [], 0, sum(counts)
    for count in counts:
        after = whole - before - count
        head = min(max(first - before, 0), count)
        tail = min(max(last - after, 0), count)
        found.append((head, tail))
        before += count
    return found
