# SPDX-License-Identifier: Apache-2.0
"""Watches one computed call of a stack, to learn how its lists run and what its segments enter and leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ... import sync
from ...models.block_io import BlockIO, entries
from ..outputs import ReturnLayout
from .collected import Returned
from .layout import BlockList, Entered, Layout, Left, Place, Stack
from .probe import decide_by_input, look_at_input, look_at_output
from .roles import BlockStandIn
from .seen import Passed, Seen, carried, copied, no_hidden_states, ours
from .segments import ENTER, LEAVE, Cut, Event, alone, continues_previous, cut
from .way import Way, version


class Recorder:
    """Stands in for every block of a stack during one call; `finish` then says what was learnt.

    known: what the recording call before has learnt, which is gone on from. way: what the host sees of this
    one. A recording call is never traced.

    That nothing happens between two blocks is taken from their tensors being the same one, not from equal
    values: what is added there may be zero today and not tomorrow, as the residuals of a ControlNet are.
    """

    def __init__(self, stack: Stack, lists: Sequence[BlockList], known: Layout, way: Way) -> None:
        self.stack, self.lists, self.known, self.way = stack, lists, known, way
        self.learns = True  # until the call turns out to be none to learn from
        self.loop_does_more = known.loop_does_more
        self.writes_inputs = known.writes_inputs
        self.events: list[Event] = []
        # what lists have left, and its version then
        self.counts: dict[int, tuple[Tensor, int]] = {}
        self.seen = [Seen(place.positions) for place in known.places or [Place()] * len(lists)]
        self.returned = Returned(lists, stack.early)
        self.opened: tuple[Any, Any] = (None, None)  # what entered the stack, and a copy of that

    def items(self, at: int) -> list[BlockStandIn]:
        """What list number `at` hands out in this call."""
        blocks = self.lists[at].blocks()
        return [BlockStandIn(partial(self._run, at, i), block) for i, block in enumerate(blocks)]

    def walk(self, at: int) -> Iterator[BlockStandIn]:
        """The same to a loop over the list, whose end shows what the model has kept."""
        self.returned.loop_begins(at)
        yield from self.items(at)
        self.seen[at].let_go()
        if self.returned.loop_ends(at, ours(self.seen, self.counts)):
            self._refuse_collected()

    # --- the call, block by block -----------------------------------------------------------------------

    def _run(self, at: int, index: int, args: tuple, kwargs: dict) -> Any:
        """Run one block of a list and look at what it is given and what it gives back."""
        blocks, last = self.lists[at], len(self.lists[at]) - 1
        block, io, stop = blocks.known[index], blocks.io(index), last - blocks.tail
        hidden, encoder = io.read(args, kwargs)
        direct = self.way.arrive(at, index, hidden)
        if index:
            self._note_arrival(at, hidden, encoder, (args, kwargs))
        elif not at:
            self._note_opening(blocks, hidden, args, kwargs)
        if index == blocks.head <= stop and not blocks.probed:
            self._enter(at, hidden, encoder, direct)
        output = block(*args, **kwargs)
        self._note_passed(at, index, io, output, hidden, encoder)
        if blocks.probed and index == blocks.head - 1:
            given = output, hidden, encoder, self.seen[at].positions
            self._probe(at, index, Left(*io.streams(*given), io.further(*given)))
        elif index < last or not index:
            self._note_written(at, output)
        if blocks.head <= index == stop:
            seen = self.seen[at]
            if blocks.closing is not None:
                output = blocks.closing.after(
                    io, output, hidden, encoder, seen.positions, seen.returns
                )
            left = io.taken_apart(output, hidden, encoder, seen.positions)
            seen.left = self._kept(at, Left(*left))
            self.events.append((at, LEAVE))
        if index == last and blocks.skips:
            if self.returned.collected(at, args, kwargs, ours(self.seen, self.counts)):
                self._refuse_collected()
        return output

    def _kept(self, at: int, left: Left) -> Left:
        """What a list has returned, as it is now: where the model writes into its streams, a copy."""
        if self.stack.tailed:
            return copied(left, self.seen[at].entered)
        if not self.writes_inputs:
            self.counts[at] = (left.hidden, version(left.hidden))
            return left
        return left._replace(hidden=left.hidden.clone())

    def _note_opening(self, blocks: BlockList, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """What enters the stack: the step may be decided by it, or by what the first blocks make of it."""
        if self.stack.probed:
            self.opened = (hidden, hidden.clone())
            return
        decide_by_input(self.stack, blocks, args, kwargs)
        look_at_input(self.stack, blocks, args, kwargs)

    def _probe(self, at: int, index: int, left: Left) -> None:
        """The last block that always runs: the step is decided by the change, and the segment begins after it."""
        hidden, encoder, _ = left
        seen, (x, copy) = self.seen[at], self.opened
        self.opened = (None, None)
        self.writes_inputs = self.writes_inputs or not sync.same(x, copy)
        seen.probed = None if index else copy  # by its second block the order of returns is known
        if isinstance(encoder, Tensor) and seen.returns.encoder is None:
            self._refuse_lost_text(at)
        look_at_output(self.stack, *left, copy if self.writes_inputs else x, seen.returns)
        if not alone(self.lists[at]):
            self._enter(at, hidden, encoder, False)

    def _refuse_lost_text(self, at: int) -> None:
        """Raise where the text is changed by the head, and not returned by its last block: a step in two parts would
        not find it again."""
        if any(seen.returns.encoder is not None for seen in self.seen[:at]):
            raise ValueError(
                f"target: Stack(first=...) ends in {self.lists[at].name}, whose blocks take the text and do not return "
                f"it; give first at most {sum(map(len, self.lists[:at]))}"
            )

    def _enter(self, at: int, hidden: Tensor, encoder: Any, direct: bool) -> None:
        """The model enters a list. Of two that follow each other directly, nothing between is kept."""
        seen = self.seen[at]
        if self.events and self.events[-1][1] == LEAVE and not self.loop_does_more:
            before = self.events[-1][0]
            seen.continues = self._continues(before, at, hidden, direct)
            if seen.continues:
                self.seen[before].left = None
                self.counts.pop(before, None)
        self.events.append((at, ENTER))
        if not seen.continues:
            self._keep_entered(seen, hidden, encoder)

    def _continues(self, before: int, at: int, hidden: Tensor, direct: bool) -> bool:
        places, left = self.known.places, self.seen[before].left
        if self.stack.tailed:  # whose blocks read all streams, also those that this list lacks
            return False
        if left is None or (self.known.segments and places[before].segment != places[at].segment):
            return False
        if left.hidden.shape == hidden.shape:
            return direct
        return continues_previous(left.hidden, hidden)

    def _keep_entered(self, seen: Seen, hidden: Tensor, encoder: Any) -> None:
        text = encoder if self.stack.keeps_text else None
        seen.entered = Entered(hidden, text, version(hidden))
        seen.clone = hidden.clone()

    def _note_passed(
        self, at: int, index: int, io: BlockIO, output: Any, hidden: Any, encoder: Any
    ) -> None:
        seen = self.seen[at]
        places = io.positions(output, hidden, encoder, seen.positions)
        value = io.streams(output, hidden, encoder, seen.positions)[0]
        if not isinstance(value, Tensor):
            raise no_hidden_states(io.name, self.lists[at].name, output)
        self.way.leave(value)
        copy = value.clone() if value.is_inference() else None
        seen.passed = Passed(index, io, output, hidden, encoder, version(value), copy)
        if index == 0:
            seen.returns = ReturnLayout.of(output, *places)
        # a hook of the user's may keep it too
        hooked = any(block._forward_hooks for block in self.lists[at].known)
        if value is not hidden and not hooked:
            self.returned.note(at, index, value, output)

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
            entered = seen.entered
            # also where nothing but zeros was added
            counted = version(entered.hidden) != entered.version
            if counted or not sync.same(entered.hidden, seen.clone):
                self.writes_inputs = True
                seen.entered = entered._replace(hidden=seen.clone, version=version(seen.clone))
            seen.clone = None

    def _note_arrival(self, at: int, hidden: Any, encoder: Any, call: tuple[tuple, dict]) -> None:
        """Which returned value is which, and whether the model's loop does something between blocks."""
        seen = self.seen[at]
        passed, seen.passed = seen.passed, None
        if passed is None:
            return
        self._learn(seen, passed, hidden, encoder)
        seen.probed = None
        given = passed.output, passed.hidden, passed.encoder, seen.positions
        seen.carried = carried(passed.io.further(*given), *call)
        before, _ = passed.io.streams(*given)
        untouched = before is hidden and passed.version == version(hidden)
        if untouched and passed.copy is not None:
            untouched = sync.same(passed.copy, hidden)
        self.loop_does_more = self.loop_does_more or not untouched
        # written into between blocks, so perhaps also where those only pass on what enters
        self.writes_inputs = self.writes_inputs or (before is hidden and not untouched)

    def _learn(self, seen: Seen, passed: Passed, hidden: Any, encoder: Any) -> None:
        """The order of a returned tuple, from what the model hands to the next block as what."""
        io, output = passed.io, passed.output
        found = entries(output)
        if io.returns is not None or found is None:
            return
        at = next((i for i, v in enumerate(found) if v is hidden), None)
        if at is None:
            return
        assumed = io.positions(output, passed.hidden, passed.encoder, seen.positions)
        text = next(
            (i for i, v in enumerate(found) if v is encoder and v is not None and i != at), None
        )
        if text is None and assumed[1] != at:
            text = assumed[1]
        seen.positions = (at, text)
        if seen.positions == assumed or passed.number:
            return
        seen.returns = ReturnLayout.of(output, at, text)
        if seen.probed is not None:  # the step was decided, and its entry noted, by the wrong order
            left = Left(hidden, encoder, io.further(output, hidden, encoder, seen.positions))
            look_at_output(self.stack, *left, seen.probed, seen.returns)
            self._keep_entered(seen, hidden, encoder)

    def _refuse_collected(self) -> None:
        """Raise, unless calls before have shown another model: then this one is computed, and nothing learnt."""
        self.learns = False
        if not self.known.segments:
            raise self.returned.refusal()

    # --- what it has learnt -----------------------------------------------------------------------------

    def finish(self) -> Layout:
        """How the stack runs, the call being over; as it was known, where this was no call to learn from.

        Raises ValueError where the lists have no residual, unless calls before have shown another model.
        """
        known = self.known
        if not self.learns or self.returned.unsettled() or not self._ran_whole():
            self.learns = False
            return known
        try:
            order, segments, interleaved = self._cut()
        except ValueError:
            if not known.segments:
                raise
            self.learns = False
            return known
        if any(version(hidden) != count for hidden, count in self.counts.values()):
            # too late for a copy: the next call makes one
            self.learns, self.writes_inputs = False, True
        loop_does_more = self.loop_does_more or interleaved
        for segment in segments:
            self._settle_written(self.seen[segment.lists[0]])
        places = [seen.place() for seen in self.seen]
        for number, members in segments:
            for at in members:
                ends = at == members[0], at == members[-1]
                places[at] = self.seen[at].place(number, *ends, members[0])
        return Layout(
            order, segments, tuple(places), interleaved, loop_does_more, self.writes_inputs
        )

    def _ran_whole(self) -> bool:
        """Whether each list that has run, and each that has run before, went from its first block to its last."""
        ran = {(at, index) for at, index, _ in self.way.calls}
        lists = {at for at, _ in ran} | set(self.known.order)
        return all({(at, 0), (at, len(self.lists[at]) - 1)} <= ran for at in lists)

    def _cut(self) -> Cut:
        """How the stack is cut: as before, where that holds in this call."""
        known, ran = self.known, [(at, index) for at, index, _ in self.way.calls]
        if self.stack.ordered and ran != sorted(set(ran)):
            raise ValueError(
                f"target: Stack(first=..., last=...) counts the blocks of {[each.name for each in self.lists]} as one "
                "list, and the model runs them in another order; name the lists in the order they run with "
                "fastcache.BlockAdapter(blocks=...)"
            )
        continuing = {at for at, seen in enumerate(self.seen) if seen.continues}
        new = cut(self.lists, self.events, continuing, self.loop_does_more, known.next_number)
        joined = [set(segment.lists) for segment in new.segments]
        finer = all(any(joins.issuperset(s.lists) for joins in joined) for s in known.segments)
        if known.segments and finer and new.order == known.order:
            if new.interleaved == known.interleaved:
                return Cut(known.order, known.segments, known.interleaved)
        return new

    def residuals(self, layout: Layout) -> Iterator[tuple[int, Entered, Left]]:
        """Per segment its number, what it entered and what it left; none where the call has let one go.

        That happens where the stack was cut otherwise than the call before had it: the next call has all.
        """
        if not self.learns:
            return
        ends = [
            (number, self.seen[members[0]].entered, self.seen[members[-1]].left)
            for number, members in layout.segments
        ]
        if all(entered and left for _, entered, left in ends):
            for number, entered, left in ends:
                if entered is not None and left is not None:
                    yield number, entered, left
