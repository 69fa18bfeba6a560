"""The first block of a stack, which always runs: its change, which decides, and what the guide sees of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import direct
from ...policies import COMPUTE
from ...storage.allocate import allocate, strides_of
from ...storage.ring import tail
from ...storage.state import State
from ..control import HEAD, PENDING, Stop
from ..guide import Guide
from ..outputs import ReturnLayout
from .layout import BlockList, Stack

_store = direct("residual_store_")


def look_at_output(
    stack: Stack, hidden: Tensor, encoder: Any, x: Tensor, returns: ReturnLayout
) -> None:
    """Have the step decided by what the first block made of x. Traced by torch.compile.

    returns: how the block returns its streams. In the head region of a compiled step it raises Stop, having
    kept what the block returned.
    """
    control, guide = stack.control, stack.guide
    if control.phase == HEAD or control.actions[stack.rule] == PENDING:
        stack.decider.measure(hidden, x)
    now = None if guide is None else guide.of(hidden, x)
    if control.phase == HEAD:
        keep_output(control.state.head, hidden, encoder, now)
        raise Stop
    action = control.actions[stack.rule]
    if action == COMPUTE or now is not None:
        note_decided(stack, hidden, x, now)
    if control.may_be_compiled and action == COMPUTE:
        if lacks_slots(stack, control.state):
            text = None if returns.encoder is None else encoder
            allocate_slots(control.state.head, hidden, text, guide)


def note_decided(stack: Stack, hidden: Tensor, x: Tensor, now: Tensor | None) -> None:
    """Keep of the first block what later steps are held against, the decision having fallen.

    now: the guide of this step; None without one.
    """
    state, action = stack.control.state, stack.control.actions[stack.rule]
    if action == COMPUTE and stack.signal == "change":
        keep_residual(state.head, hidden.detach(), x.detach())
    if now is not None and stack.guide is not None:
        stack.guide.see(state, stack.rule, action, now)


def look_at_input(stack: Stack, blocks: BlockList, args: tuple, kwargs: dict) -> None:
    """Show the guide what enters the stack, where that is what it looks at."""
    guide = stack.guide
    if guide is None or blocks.index or blocks.probed:
        return
    if guide.predictor.guide == "modulated":
        value = blocks.first_io.modulated(blocks.blocks()[0], args, kwargs)
    else:
        value = blocks.first_io.read(args, kwargs)[0]
    control = stack.control
    guide.see(control.state, stack.rule, control.actions[stack.rule], guide.of(value))


def keep_residual(head: dict[str, Any], hidden: Tensor, x: Tensor) -> None:
    """Keep the first block's residual: what later steps are compared with."""
    if torch.compiler.is_compiling():
        tail(head["residual"], x).copy_(hidden - x)
        return
    held = head.get("residual")
    if (
        held is None
        or held.shape[1:] != x.shape[1:]
        or held.shape[0] < x.shape[0]
        or (held.dtype, held.device) != (hidden.dtype, hidden.device)
    ):
        head["residual"] = allocate(x.shape, hidden.dtype, hidden.device, strides_of(hidden))
    _store(tail(head["residual"], x), hidden, x)


# A step in two parts keeps what the first block has returned, for its second part to start from.


def lacks_slots(stack: Stack, state: State) -> bool:
    """Whether such a step has nowhere to keep it."""
    if stack.signal == "":
        return False
    held, like = state.head.get("hidden"), state.head.get("residual")
    if held is None or like is None:
        return held is None
    return (held.shape, held.dtype) != (like.shape, like.dtype)


def allocate_slots(head: dict[str, Any], hidden: Tensor, encoder: Any, guide: Guide | None) -> None:
    """Make room for it. encoder: None where the block does not return it."""
    like = head.get("residual", hidden)
    head["hidden"] = allocate(like.shape, like.dtype, like.device, strides_of(like))
    if isinstance(encoder, Tensor):
        layout = strides_of(encoder)
        head["encoder"] = allocate(encoder.shape, encoder.dtype, encoder.device, layout)
    if guide is not None:
        now = head["guides"].views[0]
        head["now"] = allocate(now.shape, now.dtype, now.device, strides_of(now))


def keep_output(head: dict[str, Any], hidden: Tensor, encoder: Any, now: Tensor | None) -> None:
    """now: the guide of this step; None without one."""
    tail(head["hidden"], hidden).copy_(hidden)
    if "encoder" in head:
        tail(head["encoder"], encoder).copy_(encoder)
    if now is not None:
        tail(head["now"], now).copy_(now)


def kept_output(head: dict[str, Any], x: Tensor, encoder: Any) -> tuple[Tensor, Any, Tensor | None]:
    """What `keep_output` has kept, for a call with these streams."""
    if "encoder" in head:
        encoder = tail(head["encoder"], x)
    now = tail(head["now"], x) if "now" in head else None
    return tail(head["hidden"], x), encoder, now
