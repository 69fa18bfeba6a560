# SPDX-License-Identifier: Apache-2.0
"""The first block of a stack, which always runs: its change, which decides, and what the guide sees of it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...policies import COMPUTE
from ...storage.allocate import allocate, strides_of
from ...storage.group import SlotGroup, numbered
from ...storage.ring import end_of, tail
from ...storage.state import State
from ..control import HEAD, PENDING, REST, Stop
from ..decide import RuleSlots
from ..outputs import Entries, ReturnLayout
from .layout import BlockList, Left, Stack


def look_at_output(
    stack: Stack, hidden: Tensor, encoder: Any, more: Any, x: Tensor, returns: ReturnLayout
) -> None:
    """Have the step decided by what the first block made of x. Traced by torch.compile.

    more: what the block has returned beside the streams, by place; None where nothing is compiled. returns: how it
    returns them. In the head region of a compiled step it raises Stop, having kept all of that; so it does where the
    samples of a call have decided differently, which makes what has run their head.
    """
    control, guide = stack.control, stack.guide
    image = without_text(hidden, x) if stack.early else hidden
    if control.phase == HEAD or control.actions[stack.rule] == PENDING:
        stack.decider.measure(image, x)
    now = None if guide is None else guide.of(image, x)
    if control.phase == HEAD:
        control.state.slots[stack.rule].own.keep(hidden, encoder, more, now)
        raise Stop
    action = control.actions[stack.rule]
    if action == COMPUTE or now is not None or stack.every_step:
        note_decided(stack, image, x, now)
    if control.may_be_compiled and action == COMPUTE:
        if lacks_slots(stack, control.state):
            text = (
                None if returns.encoder is None else encoder
            )  # what it has not returned it need not give back
            allocate_slots(control.state.slots[stack.rule], Left(hidden, text, more))


def without_text(hidden: Tensor, x: Tensor) -> Tensor:
    """What became of x, where blocks that always run end in a list that joins the text in front.

    Raises ValueError where the two have no difference.
    """
    if hidden.shape == x.shape:
        return hidden
    image = hidden[:, -x.shape[1] :] if hidden.dim() > 1 else hidden
    if image.shape != x.shape:
        raise ValueError(
            f"target: the blocks that always run make {tuple(hidden.shape)} of {tuple(x.shape)}, so there is no change "
            "to decide by; give Stack(first=...) fewer blocks"
        )
    return image


def note_decided(stack: Stack, hidden: Tensor, x: Tensor, now: Tensor | None) -> None:
    """Keep of the first block what later steps are held against, the decision having fallen.

    now: the guide of this step; None without one.
    """
    state, action = stack.control.state, stack.control.actions[stack.rule]
    if stack.meter is not None and (action == COMPUTE or stack.every_step):
        stack.meter.keep(state, hidden.detach(), x.detach())
    if now is not None and stack.guide is not None:
        stack.guide.see(state, stack.rule, action, now)


def decide_by_input(stack: Stack, blocks: BlockList, args: tuple, kwargs: dict) -> None:
    """Have the step decided by what enters the stack, where its meter looks there. Traced by torch.compile.

    In the head region of a compiled step it raises Stop: no block runs there.
    """
    meter, control = stack.meter, stack.control
    if meter is None or not meter.at_input or blocks.index:
        return
    value = meter.of_block(blocks.first_io, blocks.blocks()[0], args, kwargs)
    stack.decider.measure(value, None)
    if control.phase == HEAD:
        raise Stop
    if stack.every_step or control.actions[stack.rule] == COMPUTE:
        meter.keep(control.state, value, None)


def look_at_input(stack: Stack, blocks: BlockList, args: tuple, kwargs: dict) -> None:
    """Keep what enters the stack, where that has decided in another region of this step, and show it to the guide."""
    guide, meter, control = stack.guide, stack.meter, stack.control
    if control.phase == REST and meter is not None and meter.at_input and not blocks.index:
        if stack.every_step or control.actions[stack.rule] == COMPUTE:
            value = meter.of_block(blocks.first_io, blocks.blocks()[0], args, kwargs)
            meter.keep_again(control.state, value)
    if guide is None or blocks.index or stack.probed:
        return
    if guide.predictor.guide == "modulated":
        value = blocks.first_io.modulated(blocks.blocks()[0], args, kwargs)
    else:
        value = blocks.first_io.read(args, kwargs)[0]
    guide.see(control.state, stack.rule, control.actions[stack.rule], guide.of(value))


class ProbeSlots(SlotGroup):
    """What a step in two parts keeps of its first block, for its second part to start from: its hidden states,
    its text stream and what else the block returns, and the guide of the step where there is one. form: of the
    reference that they were made beside. Traced by torch.compile."""

    __slots__ = ("encoder", "entries", "extra", "form", "hidden", "now")
    holds = ("hidden", "encoder", "now")
    parts = ("extra",)
    forms: ClassVar[tuple[str, ...]] = ("entries", "form")
    encoder: Any
    extra: Any  # the tensors of what else it returns
    hidden: Any
    now: Any

    entries: Entries | None  # how that lies; None where it returns nothing else
    form: tuple | None

    def __init__(self) -> None:
        super().__init__()
        self.entries, self.form = None, ()

    def rows(self) -> list[Tensor]:
        """The slots of `extra`: torch.compile cannot follow `tensors`."""
        group = self.extra
        return [] if group is None else [getattr(group, name) for name in group.holds]

    def take_form(self, other: ProbeSlots) -> None:
        """Have the same room as the slots of another state."""
        self.entries, self.form = other.entries, other.form
        for name in other.kept:
            setattr(self, name, allocate_like(getattr(other, name)))
        if other.extra is not None:
            self.extra = type(other.extra)()
            for name in other.extra.kept:
                setattr(self.extra, name, allocate_like(getattr(other.extra, name)))

    def keep(self, hidden: Tensor, encoder: Any, more: Any, now: Tensor | None) -> None:
        """now: the guide of this step; None without one."""
        tail(self.hidden, hidden).copy_(hidden)
        if self.encoder is not None:
            tail(self.encoder, encoder).copy_(encoder)
        if now is not None:
            tail(self.now, now).copy_(now)
        if self.entries is not None:
            for row, value in zip(self.rows(), self.entries.tensors(more), strict=True):
                tail(row, value).copy_(value)

    def give_back(self, x: Tensor, encoder: Any) -> tuple[Tensor, Any, Any, Tensor | None]:
        """What `keep` has kept, for a call with these streams."""
        if self.encoder is not None:  # streams without a batch differ in their first dimension
            encoder = tail(self.encoder, encoder if isinstance(encoder, Tensor) else x)
        now = None if self.now is None else tail(self.now, x)
        more = {}
        if self.entries is not None:
            whole = self.hidden.shape[0]
            more = self.entries.build([end_of(row, x, whole) for row in self.rows()])
        return tail(self.hidden, x), encoder, more, now


def lacks_slots(stack: Stack, state: State) -> bool:
    """Whether such a step has nowhere to keep it."""
    meter = stack.meter
    if meter is None or meter.at_input:
        return False
    rule: RuleSlots = state.slots[stack.rule]
    own, signal = rule.own, rule.signal
    return own.form != signal.form and (own.hidden is None or signal.reference is not None)


def allocate_slots(rule: RuleSlots, left: Left) -> None:
    """Make room for it. The text stream is None where the block does not return it."""
    slots: ProbeSlots = rule.own
    hidden, encoder, extra = left
    like = hidden if rule.signal.reference is None else rule.signal.reference
    if like.shape[1:] == hidden.shape[1:]:
        slots.hidden = allocate(like.shape, like.dtype, like.device, strides_of(like))
    else:  # joined with the text
        shape = (like.shape[0], *hidden.shape[1:])
        slots.hidden = allocate(shape, like.dtype, like.device)
    slots.form = (like.shape, like.dtype)
    if isinstance(encoder, Tensor):
        slots.encoder = allocate_like(encoder)
    if rule.guide is not None:
        slots.now = allocate_like(rule.guide.guides.views[0])
    slots.entries = Entries.of(extra) if extra else None
    if slots.entries is not None and slots.entries.at:
        values = slots.entries.tensors(extra)
        slots.extra = numbered(len(values))()
        for name, value in zip(slots.extra.holds, values, strict=True):
            setattr(slots.extra, name, allocate_like(value))


def allocate_like(value: Tensor) -> Tensor:
    """Storage for such a tensor, which lies in memory as that does."""
    return allocate(value.shape, value.dtype, value.device, strides_of(value))
