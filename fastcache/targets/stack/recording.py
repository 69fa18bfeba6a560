"""Watches one computed call of a stack, to learn how its lists run and what its segments enter and leave."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ... import sync
from ...models.block_io import BlockIO, Positions
from ..outputs import BARE, ReturnLayout
from .layout import BlockList, Entered, Layout, Left, Place, Stack
from .probe import decide_by_input, look_at_input, look_at_output
from .roles import BlockStandIn
from .segments import ENTER, LEAVE, Event, alone, continues_previous, cut


class Passed(NamedTuple):
    """A block that has run, by its number in its list: what it was called with and what it returned."""

    number: int
    io: BlockIO
    output: Any
    hidden: Any
    encoder: Any


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
    probed: Tensor | None = (
        None  # copy of the first block's input, until its order of returns is known
    )


class Recorder:
    """Stands in for every block of a stack during one call; `finish` then says what was learnt.

    known: what the recording call before has learnt, which is gone on from. A recording call is never traced.
    """

    def __init__(self, stack: Stack, lists: Sequence[BlockList], known: Layout) -> None:
        self.stack, self.lists, self.known = stack, lists, known
        self.loop_does_more = known.loop_does_more
        self.writes_inputs = known.writes_inputs
        self.events: list[Event] = []
        self.seen = [Seen(place.positions) for place in known.places or [Place()] * len(lists)]
        self.returned: list[weakref.ref] = []  # what each block has returned

    def items(self, at: int) -> list[BlockStandIn]:
        """What list number `at` hands out in this call."""
        blocks = self.lists[at].blocks()
        return [BlockStandIn(partial(self._run, at, i), block) for i, block in enumerate(blocks)]

    # --- the call, block by block -----------------------------------------------------------------------

    def _run(self, at: int, index: int, *args: Any, **kwargs: Any) -> Any:
        """Run one block of a list and look at what it is given and what it gives back."""
        blocks, last = self.lists[at], len(self.lists[at]) - 1
        block, io = blocks.blocks()[index], blocks.io(index)
        hidden, encoder = io.read(args, kwargs)
        if not index and blocks.probed:
            return self._run_probed(at, block, io, args, kwargs)
        if index:
            self._note_arrival(at, hidden, encoder)
        else:
            decide_by_input(self.stack, blocks, args, kwargs)
            look_at_input(self.stack, blocks, args, kwargs)
            self._enter(at, hidden, encoder)
        output = block(*args, **kwargs)
        if index < last or not index:
            self._note_passed(at, Passed(index, io, output, hidden, encoder))
            self._note_written(at, output)
        if index == last:
            positions = self.seen[at].positions
            self.seen[at].left = Left(*io.taken_apart(output, hidden, encoder, positions))
            self.events.append((at, LEAVE))
            self._refuse_collected((*args, *kwargs.values()))
        return output

    def _run_probed(self, at: int, block: nn.Module, io: BlockIO, args: tuple, kwargs: dict) -> Any:
        """The block that always runs: the step is decided by its change, and the segment begins after it."""
        seen = self.seen[at]
        x, encoder = io.read(args, kwargs)
        seen.probed = x.clone()
        output = block(*args, **kwargs)
        self._note_passed(at, Passed(0, io, output, x, encoder))
        self.writes_inputs = self.writes_inputs or not sync.same(x, seen.probed)
        hidden, encoder = io.streams(output, x, encoder, seen.positions)
        x = seen.probed if self.writes_inputs else x
        look_at_output(self.stack, hidden, encoder, x, seen.returns)
        if not alone(self.lists[at]):
            self._enter(at, hidden, encoder)
        return output

    def _enter(self, at: int, hidden: Tensor, encoder: Any) -> None:
        """The model enters a list. Of two that follow each other directly, nothing between is kept."""
        seen = self.seen[at]
        if self.events and self.events[-1][1] == LEAVE and not self.loop_does_more:
            before = self.events[-1][0]
            seen.continues = self._continues(before, at, hidden)
            if seen.continues:
                self.seen[before].left = None
        self.events.append((at, ENTER))
        if not seen.continues:
            self._keep_entered(seen, hidden, encoder)

    def _continues(self, before: int, at: int, hidden: Tensor) -> bool:
        if self.known.segments:
            places = self.known.places
            return places[before].segment == places[at].segment
        left = self.seen[before].left
        return left is not None and continues_previous(left.hidden, hidden)

    def _keep_entered(self, seen: Seen, hidden: Tensor, encoder: Any) -> None:
        seen.entered = Entered(hidden, encoder if self.stack.keeps_text else None)
        seen.clone = hidden.clone()

    def _note_passed(self, at: int, passed: Passed) -> None:
        seen, output = self.seen[at], passed.output
        seen.passed = passed
        places = passed.io.positions(output, passed.hidden, passed.encoder, seen.positions)
        if passed.number == 0:
            seen.returns = ReturnLayout.of(output, *places)
        value = output if places[0] is None else output[places[0]]
        # a hook of the user's may keep it too
        hooked = any(block._forward_hooks for block in self.lists[at].blocks())
        if isinstance(value, Tensor) and not hooked:
            self.returned.append(weakref.ref(value))

    def _note_written(self, at: int, output: Any) -> None:
        """Whether a block has written into what entered; one that passes it on says nothing yet."""
        seen = self.seen[at]
        if seen.clone is None or seen.entered is None:
            return
        place = lambda t: t.untyped_storage().data_ptr() if isinstance(t, Tensor) else None  # noqa: E731
        if place(seen.entered.hidden) not in map(place, tree_leaves(output)):
            self._settle_written(seen)

    def _settle_written(self, seen: Seen) -> None:
        """Go on with the copy of what entered, where that has been written into."""
        if seen.clone is not None and seen.entered is not None:
            if not sync.same(seen.entered.hidden, seen.clone):
                self.writes_inputs = True
                seen.entered = seen.entered._replace(hidden=seen.clone)
            seen.clone = None

    def _note_arrival(self, at: int, hidden: Any, encoder: Any) -> None:
        """Which returned value is which, and whether the model's loop does something between blocks."""
        seen = self.seen[at]
        passed, seen.passed = seen.passed, None
        if passed is None:
            return
        self._learn(seen, passed, hidden, encoder)
        seen.probed = None
        before, _ = passed.io.streams(passed.output, passed.hidden, passed.encoder, seen.positions)
        if before is not hidden:
            same = before.shape == hidden.shape and sync.same(before, hidden)
            self.loop_does_more = self.loop_does_more or not same

    def _learn(self, seen: Seen, passed: Passed, hidden: Any, encoder: Any) -> None:
        """The order of a returned tuple, from what the model hands to the next block as what."""
        io, output = passed.io, passed.output
        if io.returns is not None or not isinstance(output, tuple | list):
            return
        at = next((i for i, v in enumerate(output) if v is hidden), None)
        if at is None:
            return
        assumed = io.positions(output, passed.hidden, passed.encoder, seen.positions)
        text = next(
            (i for i, v in enumerate(output) if v is encoder and v is not None and i != at), None
        )
        if text is None and assumed[1] != at:
            text = assumed[1]
        seen.positions = (at, text)
        if seen.positions == assumed or passed.number:
            return
        seen.returns = ReturnLayout.of(output, at, text)
        if seen.probed is not None:  # the step was decided, and its entry noted, by the wrong order
            look_at_output(self.stack, hidden, encoder, seen.probed, seen.returns)
            self._keep_entered(seen, hidden, encoder)

    def _refuse_collected(self, used: tuple) -> None:
        """Raise where the model holds on to what its blocks return: a skipped stack would leave it without.

        used: arguments of the block that has just run, which are alive for that reason.
        """
        ours = [(seen.entered, seen.left, seen.passed) for seen in self.seen]
        known = {
            id(v)
            for leaf in tree_leaves((used, ours))
            for v in (leaf, getattr(leaf, "_base", None))
        }

        def held() -> bool:
            values = [value for reference in self.returned if (value := reference()) is not None]
            return any(id(value) not in known and not value.requires_grad for value in values)

        if held():
            gc.collect()  # perhaps only in a cycle that nobody refers to
        if held():
            names = [blocks.name for blocks in self.lists]
            raise ValueError(
                f"target: the model keeps what each block of {names} returns, as a "
                "ControlNet does, so they cannot be skipped together; skip modules instead: TaylorSeer, "
                "PyramidAttentionBroadcast, FasterCache, or a recipe with where=fastcache.Modules(...)"
            )

    # --- what it has learnt -----------------------------------------------------------------------------

    def finish(self) -> Layout:
        """How the stack runs, the call being over. Raises ValueError where its lists have no residual."""
        known = self.known
        order, segments, interleaved = known.order, known.segments, known.interleaved
        if not segments or (self.loop_does_more and not known.apart):
            continuing = {at for at, seen in enumerate(self.seen) if seen.continues}
            order, segments, interleaved = cut(
                self.lists, self.events, continuing, self.loop_does_more, known.next_number
            )
        loop_does_more = self.loop_does_more or interleaved
        for segment in segments:
            self._settle_written(self.seen[segment.lists[0]])
        places = [Place(returns=seen.returns, positions=seen.positions) for seen in self.seen]
        for number, members in segments:
            for at in members:
                seen = self.seen[at]
                opens, closes = at == members[0], at == members[-1]
                places[at] = Place(number, opens, closes, members[0], seen.returns, seen.positions)
        return Layout(
            order, segments, tuple(places), interleaved, loop_does_more, self.writes_inputs
        )

    def residuals(self, layout: Layout) -> Iterator[tuple[int, Entered, Left]]:
        """Per segment its number, what it entered and what it left; none where the call has let one go.

        That happens where the stack was cut otherwise than the call before had it: the next call has all.
        """
        ends = [
            (number, self.seen[members[0]].entered, self.seen[members[-1]].left)
            for number, members in layout.segments
        ]
        if all(entered and left for _, entered, left in ends):
            for number, entered, left in ends:
                if entered is not None and left is not None:
                    yield number, entered, left
