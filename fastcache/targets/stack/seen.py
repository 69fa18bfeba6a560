# SPDX-License-Identifier: Apache-2.0
"""What a recording call notes of one list while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...models.block_io import BlockIO, Positions
from ..outputs import BARE, ReturnLayout
from .layout import Carried, Entered, Left, Place


class Passed(NamedTuple):
    """A block that has run, by its number in its list: what it was called with and what it returned."""

    number: int
    io: BlockIO
    output: Any
    hidden: Any
    encoder: Any
    version: int  # of the hidden states it has returned
    copy: Tensor | None  # of these, where nothing counts what is written into them


@dataclass
class Seen:
    """What a recording call has seen of one list so far."""

    positions: Positions | None  # of the streams in a returned tuple
    returns: ReturnLayout = BARE
    entered: Entered | None = None
    left: Left | None = None
    clone: Tensor | None = None  # of what entered, until it is known to be left as it is
    continues: bool = False  # it goes on where the list before has stopped
    passed: Passed | None = None  # the block before the next one
    carried: Carried = ()  # how what a block returns beside the streams goes on to the next one
    # copy of what entered the stack, until the order of returns of its first block is known
    probed: Tensor | None = None

    def let_go(self) -> None:
        """Keep what the last block was called with no longer alive: no other one follows."""
        if self.passed is not None:
            self.passed = self.passed._replace(hidden=None, encoder=None)

    def place(
        self, segment: int = -1, opens: bool = False, closes: bool = False, opener: int = 0
    ) -> Place:
        """The place of the list in a layout."""
        seen = self.returns, self.positions, self.carried
        return Place(segment, opens, closes, opener, *seen)


def carried(further: dict[int, Any], args: tuple, kwargs: dict) -> Carried:
    """By which argument a block gets each of the entries that the one before has returned beside the streams."""
    given = [*enumerate(args), *kwargs.items()]
    pairs = ((at, key) for at, value in further.items() for key, v in given if v is value)
    return tuple({at: (at, key) for at, key in pairs if further[at] is not None}.values())


def copied(left: Left, entered: Entered | None) -> Left:
    """What a list has left, kept from blocks that write into their input; text that passes it by stays what entered."""
    hidden, text, extra = left
    passes_by = entered is not None and text is entered.encoder
    return Left(hidden.clone(), text if passes_by or text is None else text.clone(), extra)


def ours(lists: Sequence[Seen], counts: Any) -> list[tuple]:
    """What is kept here of what blocks have been given and returned. counts: what lists have left, by their numbers."""
    return [*((seen.entered, seen.left, seen.passed) for seen in lists), (counts,)]


def no_hidden_states(block: str, name: str, output: Any) -> ValueError:
    """What is to be raised where a block of the list `name` returns this."""
    return ValueError(
        f"target: {block} in {name!r} returns a {type(output).__name__}, in which no hidden states were found; blocks "
        "may return a tensor, or a tuple, list, dict or dataclass with one. Name other lists with "
        "fastcache.BlockAdapter(blocks=...), or skip modules instead with a recipe of where=fastcache.Modules(...)"
    )
