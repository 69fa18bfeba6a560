"""Skipping the stack of blocks: its residual is predicted instead of running the blocks.

The model's own loop stays as it is. Only the block lists are told, by a subclass assigned to their
`__class__`, what to hand out when the model iterates over them: on a computed step the real blocks, the
first and the last one wrapped; on a reused step one callable in place of all of them.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import signal
from ..adapters import Block, BlockIO
from ..ops import direct
from ..policies import COMPUTE, REUSE
from ..state import State, Unit, allocate, tail
from .attached import refuse_copy
from .guide import Guide

GATE = "_fastcache_gate"
_change, _magnitude = direct("residual_l1"), direct("residual_magnitude")
_store = direct("residual_store_")
# Phases of a step: all of it in one pass, or (compiled) its first block and then what follows.
WHOLE, HEAD, REST = "whole", "head", "rest"


class Stop(Exception):
    """Leaves the model's forward after its first block, in the head region of a compiled step."""


class Routing:
    """Mixed into the class of a block list while a cache is attached to it."""

    __reduce_ex__ = refuse_copy

    def __iter__(self) -> Iterator:
        gate = self.__dict__.get(GATE)
        if gate is not None and gate.owner.control.armed:
            return gate.owner.route(gate)
        return super().__iter__()  # type: ignore[misc]

    def __getitem__(self, index: Any) -> Any:
        gate = self.__dict__.get(GATE)
        if gate is not None and gate.owner.control.armed:
            return gate.owner.pick(gate, index)
        return super().__getitem__(index)  # type: ignore[misc]


_made: dict[type, type] = {}


def routed_class(base: type) -> type:
    """A subclass of a list class that routes; same name, one per base."""
    if base not in _made:
        _made[base] = type(
            base.__name__,
            (Routing, base),
            {"__module__": base.__module__, "__qualname__": base.__qualname__},
        )
    return _made[base]


@dataclass
class Form:
    """How a block's return is built: a bare tensor, or a container with the streams at these places."""

    kind: type | None = None  # None: bare tensor
    length: int = 0
    hidden: int | None = None
    encoder: int | None = None

    def build(self, hidden: Any, encoder: Any, extra: dict[int, Any]) -> Any:
        if self.kind is None:
            return hidden
        values: list[Any] = [None] * self.length
        for i, value in extra.items():
            values[i] = value
        values[self.hidden or 0] = hidden
        if self.encoder is not None:
            values[self.encoder] = encoder
        return tuple(values) if self.kind is tuple else values


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
        if not signal.same(hidden, clone):
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
        if isinstance(value, Tensor) and not any(block._forward_hooks for block in self.modules):
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
            same = before.shape == hidden.shape and signal.same(before, hidden)
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
            self.owner.judge(hidden, self.probed)
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
            owner.copies = owner.copies or not signal.same(x, kept)
            self.probed = kept
        if owner.copies:
            x = kept
        owner.judge(hidden, x)
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
        traced = owner.control.compiled and torch.compiler.is_compiling()
        weights: Any = () if traced else owner.weights
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


class StackTarget:
    """The block lists of one model, bound to one rule of a recipe."""

    def __init__(
        self,
        rule: int,
        lists: list[tuple[str, nn.ModuleList]],
        start: int,
        control: Any,
        row: Block | None,
        encoder_read: bool | None,
        make_store: Callable[[Tensor, Any], Any],
    ) -> None:
        self.rule, self.start, self.control = rule, start, control
        self.encoder_read, self.make_store = encoder_read, make_store
        self.gates = [Gate(self, name, modules, row) for name, modules in lists]
        if start:
            self.gates[0].replay_io = self.gates[0].next_io
        self.segments: list[list[Gate]] = []
        self.numbers: set[int] = set()  # of the segments that lists belong to
        self.measure = False  # calibration: also measure the magnitude ratio of every residual
        self.copies = False  # some block writes into its input: keep a copy of what went in
        self.threaded = False  # the model's loop does more than call one block after the other
        self.order: list[tuple[Gate, str]] = []
        self.returned: list[weakref.ref] = []  # what each block of a recording call has returned
        self.guide: Guide | None = (
            None  # a predictor whose weights come from this step's own blocks
        )
        self.recording = False
        self.judge: Callable[[Tensor, Tensor], None] = lambda hidden, x: None
        self.signal = ""  # what `judge` measures: "change", "misfit" or nothing
        self.weights: tuple[float, ...] = ()

    # --- installing -------------------------------------------------------------------------------------

    def install(self) -> None:
        for gate in self.gates:
            gate.modules.__dict__[GATE] = gate
            gate.modules.__class__ = routed_class(type(gate.modules))

    def remove(self) -> None:
        for gate in self.gates:
            gate.modules.__dict__.pop(GATE, None)
            if isinstance(gate.modules, Routing):
                gate.modules.__class__ = type(gate.modules).__mro__[2]

    @property
    def cut(self) -> tuple:
        """What later recording calls may change of how the lists are driven."""
        return len(self.segments), self.threaded, self.copies

    def hooked(self) -> list[str]:
        return [f"{gate.name} ({len(gate.modules)} blocks)" for gate in self.gates]

    # --- one call ---------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.control.state

    @property
    def action(self) -> str:
        return self.control.actions[self.rule]

    def begin(self) -> None:
        """Called by the runtime before the model's forward."""
        units = self.control.state.units[self.rule]
        if units and units.keys().isdisjoint(self.numbers):
            units.clear()  # from before the stack was cut anew
        self.recording = not self.segments or not units
        if self.recording:
            self.order, self.returned = [], []
            for gate in self.gates:
                gate.handed = None

    def recorded(self, state: State) -> bool:
        """Whether storage exists, so that a graph may use it; measuring is done eagerly."""
        if not state.units[self.rule] or self.measure:
            return False
        return not (self.control.compiled and self._lacks_head(state))

    def _lacks_head(self, state: State) -> bool:
        """Whether a step in two parts has nowhere to keep its first block."""
        return self.signal != "" and "hidden" not in state.head

    def ready(self, state: State) -> bool:
        """Whether a step can be reused from this state."""
        units, timeline = state.units[self.rule], state.timelines[self.rule]
        if self.control.batch == "full" and state.halved:
            return False  # steps of the conditional half alone have left the other half behind
        if self.guide is not None and len(timeline.steps) < timeline.depth:
            return False
        for unit in units.values():
            if not unit.ready(timeline):
                return False
        return bool(units)

    def route(self, gate: Gate) -> Iterator:
        """What the model's loop gets. Traced by torch.compile: reads `control` and nothing that counts."""
        action = self.control.actions[self.rule]
        if self.control.phase == WHOLE and action not in (COMPUTE, REUSE):
            return self._route_probed(gate)
        if action == REUSE and not self.control.compiled:
            return iter(self._handed(gate) if gate.handed is None else gate.handed)
        return iter(self._ported(gate, self._listed(gate)))

    def _handed(self, gate: Gate) -> list:
        """What a list hands out on every reused step, until a recording call sees the stack anew."""
        gate.handed = self._ported(gate, self._listed(gate))
        return gate.handed

    def _ported(self, gate: Gate, handed: list) -> list:
        """The same items, roles replaced by what plays them in the place of each block."""
        return [gate.ports[h][i] if isinstance(h, str) else h for i, h in enumerate(handed)]

    def _head(self) -> str:
        return "resume" if self.control.phase == REST else "probe"

    def _listed(self, gate: Gate) -> list:
        """What a list hands out when the action is known beforehand: blocks, and roles in their places."""
        head = self.start if gate is self.gates[0] else 0
        if self.action == REUSE:
            if self.threaded:
                return self._threaded(gate, head)
            probe = [self._head()] if head else []
            return [*probe, "replay"] if gate.opens else probe
        return self._computed(gate, head)

    def _threaded(self, gate: Gate, head: int) -> list:
        """On a reused step, one item for every block, since the model's loop does more than call them."""
        count = len(gate.modules)
        if gate.opens and gate.closes and count == 1:
            return ["replay"]
        items: list[Any] = ["through"] * count
        if gate.opens:
            items[0] = "arrive"
        if head:
            items[0] = self._head()
        if gate.closes:
            items[-1] = "depart"
        return items

    def _route_probed(self, gate: Gate) -> Iterator:
        """Where the decision falls after the first block of the first list has run (eager only)."""
        if gate is not self.gates[0]:  # taking turns with the first list: not yet decided
            for i, block in enumerate(gate.modules._modules.values()):
                yield Port(functools.partial(self._late, gate, i), block)
            return
        yield gate.ports["probe"][0]
        action = self.control.actions[self.rule]
        if action not in (COMPUTE, REUSE):  # all blocks are asked for before the first one runs
            for i, block in enumerate(gate.modules._modules.values()):
                if i:
                    yield Port(functools.partial(self._late, gate, i), block)
            return
        if action == REUSE:
            yield from (self._handed(gate) if gate.handed is None else gate.handed)[1:]
        else:
            yield from self._ported(gate, self._computed(gate, 1))[1:]

    def _late(self, gate: Gate, index: int, *args: Any, **kwargs: Any) -> Any:
        handed = self._listed(gate)
        handed += ["through"] * (len(gate.modules) - len(handed))
        return self._ported(gate, handed)[index](*args, **kwargs)

    def keep_head(self, hidden: Tensor, encoder: Any) -> None:
        """Keep what the first block returned, for the rest of this step to start from."""
        head = self.state.head
        tail(head["hidden"], hidden).copy_(hidden)
        if "encoder" in head:
            tail(head["encoder"], encoder).copy_(encoder)

    def keep_residual(self, hidden: Tensor, x: Tensor) -> None:
        """On a computed step, make the first block's residual what later steps are compared with."""
        if self.signal != "change" or self.control.actions[self.rule] != COMPUTE:
            return
        head, hidden, x = self.state.head, hidden.detach(), x.detach()
        if torch.compiler.is_compiling():
            tail(head["residual"], x).copy_(hidden - x)
            return
        held = head.get("residual")
        if held is None or held.shape[1:] != x.shape[1:] or held.shape[0] < x.shape[0]:
            head["residual"] = allocate(x.shape, x.dtype, x.device)
        _store(tail(head["residual"], x), hidden, x)

    def _computed(self, gate: Gate, head: int) -> list:
        blocks: list[Any] = list(gate.modules._modules.values())
        wraps_first = not head and (self.recording or gate.opens)
        wraps_last = self.recording or gate.closes
        if len(blocks) == 1:
            if head:
                return [self._head()]
            if wraps_first:
                return ["only" if wraps_last else "first"]
            return ["last" if wraps_last else blocks[0]]
        blocks[0] = self._head() if head else "first" if wraps_first else blocks[0]
        if wraps_last:
            blocks[-1] = "last"
        if self.recording:
            blocks[1:-1] = [gate.middle(i) for i in range(1, len(blocks) - 1)]
        return blocks

    def pick(self, gate: Gate, index: Any) -> Any:
        """`blocks[i]` or `blocks[a:b]` inside a model's forward, routed like iteration."""
        blocks = list(gate.modules._modules.values())
        head = self.start if gate is self.gates[0] else 0
        if self.action == REUSE:
            handed = self._listed(gate)
            handed += ["through"] * (len(blocks) - len(handed))
        else:
            handed = self._computed(gate, head)
        return self._ported(gate, handed)[index]

    # --- storing ----------------------------------------------------------------------------------------

    def store(self, segment: int, exit: tuple[Any, Any, dict[int, Any]]) -> None:
        """Keep the residual of one segment, its entry having been noted."""
        state, (hidden, encoder) = self.state, self.segments[segment][0].entry
        units = state.units[self.rule]
        out, text, extra = exit
        if segment not in units:
            units[segment] = self._unit(hidden, encoder, exit)
        if self.control.compiled and self._lacks_head(state):
            self._allocate_head(hidden, encoder)
        unit = units[segment]
        based, texted, extras = unit.template
        y = out.detach()
        if isinstance(based, torch.Size):
            hidden = turned(hidden, based)
        elif based and y.shape != hidden.shape:
            y = y[:, -hidden.shape[1] :]
        step = 0 if torch.compiler.is_compiling() else state.armed_step
        if self.measure and based:
            self._measure(unit, y, hidden.detach())
        unit.streams[0].store(y, hidden.detach() if based else None, step)
        if texted:
            unit.streams[1].store(text.detach(), encoder.detach(), step)
        for i, at in enumerate(extras):
            unit.streams[1 + texted + i].store(extra[at].detach(), None, step)
        unit.touched = True
        self.segments[segment][0].entry = (None, None)

    def _allocate_head(self, hidden: Tensor, encoder: Any) -> None:
        """Where compiled regions keep what the first block returned."""
        head = self.state.head
        like = head.get("residual", hidden)
        head["hidden"] = allocate(like.shape, like.dtype, like.device)
        if self.gates[0].form.encoder is not None and isinstance(encoder, Tensor):
            head["encoder"] = allocate(encoder.shape, encoder.dtype, encoder.device)
        if self.guide is not None:
            now = head["guides"].views[0]
            head["now"] = allocate(now.shape, now.dtype, now.device)

    def _measure(self, unit: Unit, y: Tensor, x: Tensor) -> None:
        """MagCache's ratio of this residual to the last one, left on the device; 1 at the first step."""
        stored: Any = unit.streams[0]
        prev = stored.views[0]
        if self.state.timelines[self.rule].pushes:
            ratio = _magnitude(y, x, prev)
        else:
            ratio = torch.ones(1, device=y.device)
        self.state.measured.append(ratio)

    def _unit(self, hidden: Tensor, encoder: Any, exit: tuple[Any, Any, dict[int, Any]]) -> Unit:
        """Allocate the streams of a segment at its first computed step."""
        out, text, extra = exit
        timeline = self.state.timelines[self.rule]
        fused = (
            out.dim() == hidden.dim() == 3
            and out.shape[0] == hidden.shape[0]
            and out.shape[2] == hidden.shape[2]
            and out.shape[1] > hidden.shape[1]
        )
        based: Any = out.shape == hidden.shape or fused
        if not based and turns(hidden.shape, out.shape):
            based = out.shape
        texted = (
            self.encoder_read is not False
            and isinstance(text, Tensor)
            and isinstance(encoder, Tensor)
            and text.shape == encoder.shape
            and text is not encoder
        )
        unit = Unit()
        extras = [at for at, value in extra.items() if isinstance(value, Tensor)]
        unit.extra = {at: value for at, value in extra.items() if not isinstance(value, Tensor)}
        values = [
            hidden if based is True else out,
            *([text] if texted else []),
            *(extra[at] for at in extras),
        ]
        unit.streams = [self.make_store(value, timeline) for value in values]
        unit.template = (based, texted, tuple(extras))
        return unit

    def finish(self) -> None:
        """Called by the runtime after a forward: settle what a recording call has seen."""
        if not self.recording or self.action == REUSE:
            return
        self.recording = False
        if not self.segments or (self.threaded and not self._apart()):
            self._settle_segments()
        for gates in filter(None, self.segments):
            head = gates[0]
            if head.clone is not None and not signal.same(head.entry[0], head.clone):
                self.copies = True
                head.entry = (head.clone, head.entry[1])
        cut = [(number, gates) for number, gates in enumerate(self.segments) if gates]
        # what was let go is there next time, now that the cut is known
        if all(gates[0].entry[0] is not None and gates[-1].exit[0] is not None for _, gates in cut):
            for number, gates in cut:
                self.store(number, gates[-1].exit)
        else:
            self.state.units[self.rule].clear()
        for gate in self.gates:
            gate.clone, gate.entry, gate.exit = None, (None, None), (None, None, {})
            gate.passed = gate.probed = None

    def note_entry(self, gate: Gate, hidden: Tensor) -> None:
        """A recording call enters a list. Of two that follow each other directly, nothing between is kept."""
        before, kind = self.order[-1] if self.order else (gate, "")
        gate.chained = False
        if kind == "leave" and not self.threaded:
            known = bool(self.segments)
            gate.chained = (
                before.segment == gate.segment if known else _chained(before.exit[0], hidden)
            )
            if gate.chained:
                before.exit = (None, None, {})
        self.order.append((gate, "enter"))

    def refuse_collected(self, used: tuple) -> None:
        """Raise where the model holds on to what its blocks return: a skipped stack would leave it without.

        used: arguments of the block that has just run, which are alive for that reason.
        """
        ours = [(gate.entry, gate.exit, gate.passed) for gate in self.gates]
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
            raise ValueError(
                f"target: the model keeps what each block of {[g.name for g in self.gates]} returns, as a "
                "ControlNet does, so they cannot be skipped together; skip modules instead: TaylorSeer, "
                "PyramidAttentionBroadcast, FasterCache, or a recipe with where=fastcache.Modules(...)"
            )

    def _apart(self) -> bool:
        """Whether the stack is cut as a threaded one is."""
        return all(len(gates) == 1 or gates[-1].woven for gates in filter(None, self.segments))

    def _settle_segments(self) -> None:
        """Join lists whose blocks follow each other directly; the others get a residual of their own."""
        events = [gate for gate, _ in self.order]
        alone = (
            self.start and len(self.gates[0].modules) == 1
        )  # a list that holds nothing but the probe
        missing = [g.name for g in self.gates[bool(alone) :] if g not in events]
        if missing:
            raise ValueError(
                f"target: the model did not iterate over {missing}, so its blocks cannot be skipped; name the "
                "lists it does use with fastcache.BlockAdapter(blocks=...)"
            )
        ordered = list(dict.fromkeys(events))
        if len(set(self.order)) != len(self.order):
            raise ValueError(
                f"target: the model runs the lists {[g.name for g in self.gates]} more than once in a call, so "
                "they have no residual; use a module target, or name another list with "
                "fastcache.BlockAdapter(blocks=...)"
            )
        woven = self.order != [(g, kind) for g in ordered for kind in ("enter", "leave")]
        if self.start and not alone and ordered[0] is not self.gates[0]:
            raise ValueError(
                f"target: the model runs {ordered[0].name} before {self.gates[0].name}; name the lists in the "
                "order they run with fastcache.BlockAdapter(blocks=...)"
            )
        segments = [[ordered[0]]]
        self.threaded = self.threaded or woven
        for after in ordered[1:]:
            if woven or (not self.threaded and after.chained):
                segments[-1].append(after)
            else:
                segments.append([after])
        # a cut is never numbered like an earlier one, so that what was stored for that is not taken for it
        segments = [*[[]] * len(self.segments), *segments]
        for number, gates in enumerate(segments):
            for gate in gates:
                gate.segment, gate.woven = number, woven
                gate.opens, gate.closes = gate is gates[0], gate is gates[-1]
        if alone:
            self.gates[0].opens = self.gates[0].closes = False
        self.segments, self.numbers = segments, {gate.segment for gate in self.gates}


def turns(entered: torch.Size, left: torch.Size) -> bool:
    """Whether [batch x frames, tokens, C] went in and [batch x tokens, frames, C] came out."""
    return (
        len(entered) == len(left) == 3
        and entered[2] == left[2]
        and entered[0] * entered[1] == left[0] * left[1]
        and entered[0] % left[1] == 0
    )


def turned(x: Tensor, shape: torch.Size) -> Tensor:
    """[batch x frames, tokens, C] in the layout `shape` of blocks that attend over frames."""
    return x.unflatten(0, (-1, shape[1])).transpose(1, 2).reshape(shape)


def _chained(left: Tensor, entered: Tensor) -> bool:
    """Whether one list goes on where the other stopped, perhaps with the text joined in front."""
    if left.shape == entered.shape:
        return signal.same(left, entered)
    joined = left.dim() == entered.dim() == 3 and entered.shape[1] > left.shape[1]
    return joined and signal.same(left, entered[:, -left.shape[1] :])


def first_change(state: State, hidden: Tensor, x: Tensor, per_sample: bool) -> Tensor | None:
    """The two sums of the first block's residual against that of the last computed step; None without one.

    [2], or per sample [B, 2].
    """
    if "kept" not in state.head:
        return None
    hidden = hidden.detach() if hidden.requires_grad else hidden
    x = x.detach() if x.requires_grad else x
    return _change(hidden, x, tail(state.head["residual"], x), per_sample)
