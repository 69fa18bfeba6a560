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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ... import sync
from ...models.adapter import Block
from ...ops import direct
from ...policies import COMPUTE, REUSE
from ...policies.magnitude import Calibrate
from ...predictors import Guided
from ...storage.allocate import allocate, strides_of
from ...storage.ring import tail
from ...storage.state import State
from ...storage.unit import Unit
from ..control import REST, WHOLE
from ..decide import Part, RuleDecider
from ..guide import Guide
from ..install import hooked_class
from .gate import Gate, Port
from .residual import turned, turns
from .routing import GATE, Routing
from .segments import chained

_magnitude = direct("residual_magnitude")


_store = direct("residual_store_")


class StackTarget:
    """The block lists of one model, bound to one rule of a recipe."""

    def __init__(
        self,
        part: Part,
        lists: list[tuple[str, nn.ModuleList]],
        start: int,
        row: Block | None,
        encoder_read: bool | None,
        make_store: Callable[[Tensor, Any], Any],
    ) -> None:
        self.rule, self.start, self.control = part.index, start, part.control
        # a predictor whose weights come from this step's own blocks
        self.guide = Guide(part.what) if isinstance(part.what, Guided) else None
        self.decider = RuleDecider(part, self.ready, self.guide)
        self.signal = self.decider.measures  # "change", "misfit" or nothing
        # calibration: also measure the magnitude ratio of every residual
        self.measure = isinstance(part.when, Calibrate)
        self.encoder_read, self.make_store = encoder_read, make_store
        self.gates = [Gate(self, name, modules, row) for name, modules in lists]
        if start:
            self.gates[0].replay_io = self.gates[0].next_io
        self.segments: list[list[Gate]] = []
        self.numbers: set[int] = set()  # of the segments that lists belong to
        self.copies = False  # some block writes into its input: keep a copy of what went in
        self.threaded = False  # the model's loop does more than call one block after the other
        self.order: list[tuple[Gate, str]] = []
        self.returned: list[weakref.ref] = []  # what each block of a recording call has returned
        self.recording = False

    # --- installing -------------------------------------------------------------------------------------

    def install(self) -> None:
        for gate in self.gates:
            gate.modules.__dict__[GATE] = gate
            gate.modules.__class__ = hooked_class(type(gate.modules), Routing)

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
        return not (self.control.may_be_compiled and self._lacks_head(state))

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

    def commit(self, state: State, action: str) -> None:
        """Called by the runtime after a step that went well."""
        if action != COMPUTE:
            return
        half = self.control.batch == "half"
        state.halved = state.timelines[self.rule].depth if half else max(state.halved - 1, 0)
        if self.signal == "change":
            state.head["kept"] = True

    def route(self, gate: Gate) -> Iterator:
        """What the model's loop gets. Traced by torch.compile: reads `control` and nothing that counts."""
        action = self.control.actions[self.rule]
        if self.control.phase == WHOLE and action not in (COMPUTE, REUSE):
            return self._route_probed(gate)
        if action == REUSE and not self.control.may_be_compiled:
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
            head["residual"] = allocate(x.shape, x.dtype, x.device, strides_of(hidden))
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
        if self.control.may_be_compiled and self._lacks_head(state):
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
        head["hidden"] = allocate(like.shape, like.dtype, like.device, strides_of(like))
        if self.gates[0].form.encoder is not None and isinstance(encoder, Tensor):
            layout = strides_of(encoder)
            head["encoder"] = allocate(encoder.shape, encoder.dtype, encoder.device, layout)
        if self.guide is not None:
            now = head["guides"].views[0]
            head["now"] = allocate(now.shape, now.dtype, now.device, strides_of(now))

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
            if head.clone is not None and not sync.same(head.entry[0], head.clone):
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
                before.segment == gate.segment if known else chained(before.exit[0], hidden)
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
