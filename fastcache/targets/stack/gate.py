"""The wrapped places of one block list."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ... import sync
from ...models.adapter import Block
from ...models.block_io import BlockIO
from ...policies import REUSE
from ...storage.ring import tail
from ...storage.unit import Unit
from ..control import HEAD, Stop
from ..outputs import Form
from .residual import turned

if TYPE_CHECKING:
    from .target import StackTarget


class Port:
    """What a list hands out in place of a block: called like it, and with its attributes."""

    def __init__(self, run: Callable, block: nn.Module) -> None:
        self.run, self.block = run, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


# What may stand in a block's place, by the name of the Gate's method that is called.
ROLES = (
    "first",
    "last",
    "only",
    "probe",
    "resume",
    "replay",
    "through",
    "arrive",
    "depart",
)


class Gate:
    """The wrapped places of one block list: where its segment is entered, left or replayed."""

    def __init__(
        self, owner: StackTarget, name: str, modules: nn.ModuleList, row: Block | None
    ) -> None:
        self.owner, self.name, self.modules = owner, name, modules
        self.row = row
        self.first_io, self.last_io = (
            BlockIO(modules[0], row),
            BlockIO(modules[len(modules) - 1], row),
        )
        self.next_io = BlockIO(modules[1], row) if len(modules) > 1 else self.first_io
        self.replay_io = self.first_io
        # made beforehand, since traced code cannot make them
        self.ports = {
            role: [Port(getattr(self, role), block) for block in modules._modules.values()]
            for role in ROLES
        }
        self.segment = -1  # which segment this list belongs to
        self.opens = self.closes = True  # first and last list of its segment
        self.woven = False  # its segment is of lists that take turns
        self.form = Form()
        self.handed: list | None = None  # on reused steps, where nothing is compiled
        self.entry: tuple[Any, Any] = (None, None)
        self.exit: tuple[Any, Any, dict[int, Any]] = (None, None, {})
        self.clone: Tensor | None = None  # of what entered, until it is known to be left as it is
        self.chained = False  # goes on where the list before has stopped
        self.passed: Any = None  # what the block before returned, while recording
        self.probed: Any = None  # input of the first block, while recording

    # --- compute -----------------------------------------------------------------------------------

    def enter(self, hidden: Any, encoder: Any) -> None:
        owner = self.owner
        if owner.recording:
            owner.note_entry(self, hidden)
            if self.chained:
                return
            self.clone = hidden.clone()
        elif owner.copies:
            hidden = hidden.clone()
        if owner.action != REUSE and owner.encoder_read is False and not owner.signal:
            encoder = None  # not to be kept alive: its residual is not stored
        self.entry = (hidden, encoder)

    def first(self, *args: Any, **kwargs: Any) -> Any:
        """The first block of a list."""
        hidden, encoder = self.first_io.read(args, kwargs)
        self.look(args, kwargs)
        self.enter(hidden, encoder)
        output = self.block(0)(*args, **kwargs)
        if self.owner.recording:
            self.note_form(self.first_io, output, hidden, encoder)
            self.note_passed(self.first_io, output, hidden, encoder)
            self.note_written(output)
        return output

    def note_written(self, output: Any) -> None:
        """Whether a block has written into what entered; one that passes it on says nothing yet."""
        (hidden, encoder), clone = self.entry, self.clone
        place = lambda t: t.untyped_storage().data_ptr() if isinstance(t, Tensor) else None  # noqa: E731
        if clone is None or place(hidden) in map(place, tree_leaves(output)):
            return
        if not sync.same(hidden, clone):
            self.owner.copies, self.entry = True, (clone, encoder)
        self.clone = None

    def middle(self, index: int) -> Port:
        """A block in between on a recording call: looks whether it gets what the one before returned."""
        block = self.block(index)
        io = BlockIO(block, self.row)

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, encoder = io.read(args, kwargs)
            self.note_arrival(hidden, encoder)
            output = block(*args, **kwargs)
            self.note_passed(io, output, hidden, encoder)
            self.note_written(output)
            return output

        return Port(run, block)

    def note_passed(self, io: BlockIO, output: Any, hidden: Any, encoder: Any) -> None:
        self.passed = (io, output, hidden, encoder)
        at, _ = io.positions(output, hidden, encoder)
        value = output if at is None else output[at]
        # a hook of the user's may keep it too
        if isinstance(value, Tensor) and not any(
            block._forward_hooks for block in self.modules._modules.values()
        ):
            self.owner.returned.append(weakref.ref(value))

    def note_arrival(self, hidden: Any, encoder: Any) -> None:
        """Which returned value is which, and whether the model's loop does something between blocks."""
        if self.passed is None:
            return
        (io, output, *given), self.passed = self.passed, None
        self.learn(io, output, given, hidden, encoder)
        self.probed = None
        hidden_at, _ = io.positions(output, *given)
        before = output if hidden_at is None else output[hidden_at]
        if before is not hidden:
            same = before.shape == hidden.shape and sync.same(before, hidden)
            self.owner.threaded = self.owner.threaded or not same

    def learn(self, io: BlockIO, output: Any, given: list, hidden: Any, encoder: Any) -> None:
        """The order of a returned tuple, from what the model hands to the next block as what."""
        if io.returns is not None or not isinstance(output, tuple | list):
            return
        at = next((i for i, v in enumerate(output) if v is hidden), None)
        if at is None:
            return
        assumed = io.positions(output, *given)
        text = next(
            (i for i, v in enumerate(output) if v is encoder and v is not None and i != at), None
        )
        if text is None and assumed[1] != at:
            text = assumed[1]
        for each in (io, self.first_io, self.next_io, self.last_io, self.replay_io):
            each.found = (at, text)
        if (at, text) == assumed or io is not self.first_io:
            return
        self.note_form(io, output, *given)
        if self.probed is not None:  # it was measured, and its exit noted, by the wrong order
            self.owner.decider.measure(hidden, self.probed)
            self.owner.keep_residual(hidden, self.probed)
            if self.opens:
                self.clone, self.entry = hidden.clone(), (hidden, encoder)

    def last(self, *args: Any, **kwargs: Any) -> Any:
        """The last block of a list."""
        if self.owner.recording:
            self.note_arrival(*self.last_io.read(args, kwargs))
        output = self.block(len(self.modules) - 1)(*args, **kwargs)
        self.leave(args, kwargs, output)
        return output

    def only(self, *args: Any, **kwargs: Any) -> Any:
        """The single block of a list."""
        output = self.first(*args, **kwargs)
        self.leave(args, kwargs, output)
        return output

    def leave(self, args: tuple, kwargs: dict, output: Any) -> None:
        hidden, encoder = self.last_io.read(args, kwargs)
        hidden_at, encoder_at = self.last_io.positions(output, hidden, encoder)
        extra: dict[int, Any] = {}
        if hidden_at is None:
            left = (output, encoder, extra)
        else:
            if self.last_io.returns is None:
                extra = {i: v for i, v in enumerate(output) if i not in (hidden_at, encoder_at)}
            text = None if encoder_at is None else output[encoder_at]
            left = (output[hidden_at], text, extra)
        if self.owner.recording:
            self.exit = left
            self.owner.order.append((self, "leave"))
            self.owner.refuse_collected((*args, *kwargs.values()))
        elif self.closes:
            self.owner.store(self.segment, left)

    def note_form(self, io: BlockIO, output: Any, hidden: Any, encoder: Any) -> None:
        hidden_at, encoder_at = io.positions(output, hidden, encoder)
        if hidden_at is None:
            self.form = Form()
        else:
            kind = list if isinstance(output, list) else tuple
            self.form = Form(kind, len(output), hidden_at, encoder_at)

    # --- the block that always runs, and its metric ---------------------------------------------------

    def probe(self, *args: Any, **kwargs: Any) -> Any:
        """The first block of the stack where the policy or the predictor wants to see its residual."""
        owner = self.owner
        x, encoder = self.first_io.read(args, kwargs)
        if owner.copies or owner.recording:
            kept = x.clone()
        output = self.block(0)(*args, **kwargs)
        hidden_at, encoder_at = self.first_io.positions(output, x, encoder)
        hidden = output if hidden_at is None else output[hidden_at]
        encoder = encoder if encoder_at is None else output[encoder_at]
        if owner.recording:
            self.note_form(self.first_io, output, x, encoder)
            self.note_passed(self.first_io, output, x, encoder)
            owner.copies = owner.copies or not sync.same(x, kept)
            self.probed = kept
        if owner.copies:
            x = kept
        owner.decider.measure(hidden, x)
        if owner.control.phase == HEAD:
            owner.keep_head(hidden, encoder)
            if owner.guide is not None:
                now = owner.guide.of(hidden, x)
                tail(owner.state.head["now"], now).copy_(now)
            raise Stop
        owner.keep_residual(hidden, x)
        action = owner.control.actions[owner.rule]
        if owner.guide is not None:
            owner.guide.see(owner.state, owner.rule, action, owner.guide.of(hidden, x))
        if (action != REUSE or owner.threaded) and self.opens and len(self.modules) > 1:
            self.enter(hidden, encoder)
        return output

    def resume(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the first block where it has run already, in the head region of this step."""
        head = self.owner.state.head
        x, encoder = self.first_io.read(args, kwargs)
        hidden = tail(head["hidden"], x)
        if "encoder" in head:
            encoder = tail(head["encoder"], x)
        owner = self.owner
        owner.keep_residual(hidden, x)
        if owner.guide is not None:
            owner.guide.see(owner.state, owner.rule, owner.action, tail(head["now"], x))
        if (owner.action != REUSE or owner.threaded) and self.opens and len(self.modules) > 1:
            self.enter(hidden, encoder)
        return self.form.build(hidden, encoder, {})

    # --- reuse ----------------------------------------------------------------------------------------

    def replay(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for all blocks of the segment: its input plus the predicted residual."""
        if self.owner.guide is not None:
            self.look(args, kwargs)
        return self.predicted(*self.replay_io.read(args, kwargs))

    def look(self, args: tuple, kwargs: dict) -> None:
        """Show the guide what enters the stack, where that is what it looks at."""
        owner = self.owner
        if owner.guide is None or owner.start or self is not owner.gates[0]:
            return
        value = self.first_io.read(args, kwargs)[0]
        if owner.guide.predictor.guide == "modulated":
            value = self.first_io.modulated(self.block(0), args, kwargs)
        owner.guide.see(owner.state, owner.rule, owner.action, owner.guide.of(value))

    def predicted(self, hidden: Any, encoder: Any) -> Any:
        """What the last block of the segment would return, from what its first one got."""
        owner = self.owner
        state = owner.control.state
        unit: Unit = state.units[owner.rule][self.segment]
        # where nothing is compiled, nothing asks whether this is traced
        traced = owner.control.may_be_compiled and torch.compiler.is_compiling()
        weights: Any = () if traced else owner.control.weights[owner.rule]
        if owner.guide is not None:  # they lie on the device
            weights = state.head["weights"]
        based, texted, extras = unit.template
        streams = unit.streams
        base = turned(hidden, based) if isinstance(based, torch.Size) else hidden
        predicted = streams[0].predict(base if based else None, weights)
        if texted:
            encoder = streams[1].predict(encoder, weights)
        extra = dict(unit.extra) if unit.extra else {}
        for i, at in enumerate(extras):
            extra[at] = streams[1 + texted + i].predict(None, weights)
        return self.form.build(predicted, encoder, extra)

    def through(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for a block that the model's loop still calls on a reused step: gives back its input."""
        hidden, encoder = self.first_io.read(args, kwargs)
        return self.form.build(hidden, encoder, {})

    def arrive(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the first block of a threaded segment: notes its input and gives it back."""
        self.look(args, kwargs)
        self.enter(*self.first_io.read(args, kwargs))
        return self.through(*args, **kwargs)

    def depart(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the last block of a threaded segment: what the loop did on the way is cached too."""
        head = self.owner.segments[self.segment][0]
        (hidden, encoder), head.entry = head.entry, (None, None)
        return self.predicted(hidden, encoder)

    def block(self, index: int) -> nn.Module:
        return list(self.modules._modules.values())[index]
