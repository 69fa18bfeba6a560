# SPDX-License-Identifier: Apache-2.0
"""The residual of a segment, what it leaves less what it entered: allocated, stored, measured, predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops import direct
from ...storage.allocate import Unfit
from ...storage.history import Timeline
from ...storage.ring import end_of
from ...storage.state import State
from ...storage.unit import Unit
from ..outputs import Entries, ReturnLayout
from .layout import Entered, Left

_magnitude = direct("residual_magnitude")


class SegmentTemplate(NamedTuple):
    """What the streams of a segment's unit hold.

    base: the first one is a residual; a shape where what entered is turned into that one first; False where
    it is the value itself. joined: the text was joined in front of what entered, and is left out. text: the second
    one is the residual of the text stream. extras: what else is returned; the streams after those hold the tensors
    in it.
    """

    base: bool | torch.Size
    joined: bool
    text: bool
    extras: Entries


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


def template_of(entered: Entered, left: Left) -> SegmentTemplate:
    """What is to be held of a segment, by the shapes of what it entered and left."""
    x, y = entered.hidden.shape, left.hidden.shape
    # the text joined in front of the image: [batch, text + tokens, C]
    joined = len(x) == len(y) == 3 and (x[0], x[2]) == (y[0], y[2]) and y[1] > x[1]
    base: bool | torch.Size = x == y or joined
    if not base and turns(x, y):
        base = y
    text = (
        isinstance(left.encoder, Tensor)
        and isinstance(entered.encoder, Tensor)
        and left.encoder.shape == entered.encoder.shape
        and left.encoder is not entered.encoder
    )
    return SegmentTemplate(base, joined, text, Entries.of(left.extra))


def allocate_unit(
    entered: Entered, left: Left, timeline: Timeline, make_store: Callable[[Tensor, Any], Any]
) -> Unit:
    """Storage for a segment, at its first computed step. make_store: (value, timeline) -> a stream."""
    unit = Unit()
    unit.template = template = template_of(entered, left)
    unit.entry = entered.hidden.shape
    unit.make(values_of(template, entered, left), timeline, make_store)
    return unit


def values_of(template: SegmentTemplate, entered: Entered, left: Left) -> list[Tensor]:
    """What the streams of a segment's unit are made for: in the shape and the dtype that the model gives, and lying
    in memory as what they are added to."""
    hidden, base = left.hidden, entered.hidden
    if template.base is True:  # of joined streams, the image alone
        hidden = hidden[:, -base.shape[1] :] if hidden.dim() > 1 else hidden
        hidden = base if (base.shape, base.dtype) == (hidden.shape, hidden.dtype) else hidden
    texts = [left.encoder] if template.text else []
    return [hidden, *texts, *template.extras.tensors(left.extra)]


def fits(unit: Unit, entered: Entered, left: Left, half: bool) -> bool:
    """Whether a unit has storage for this residual. half: it is of half a guidance batch."""
    template = template_of(entered, left)
    if template != unit.template:
        return False
    return unit.fits(values_of(template, entered, left), half)


def keep(state: State, rule: int, number: int, entered: Entered, left: Left, measure: bool) -> None:
    """Store the residual of a segment that has been computed. Traced by torch.compile.

    measure: also note its magnitude ratio to the one before.
    """
    unit = state.units[rule][number]
    streams = unit.streams
    base, joined, text, extras = unit.template
    y, x = left.hidden.detach(), None
    if base:
        x = entered.hidden
        if isinstance(base, torch.Size):
            x = turned(x, base)
        elif joined:  # no shapes are compared here, which a model may make of what its tensors hold
            y = y[:, -x.shape[1] :]
        x = x.detach()
        if measure:
            state.measured.append(magnitude_ratio(y, x, unit, state.timelines[rule]))
    step = 0 if torch.compiler.is_compiling() else state.armed_step
    streams[0].store(y, x, step)
    if text:
        streams[1].store(left.encoder.detach(), entered.encoder.detach(), step)
    for i, value in enumerate(extras.tensors(left.extra), 1 + text):
        streams[i].store(value.detach(), None, step)
    unit.touched = True


def magnitude_ratio(y: Tensor, x: Tensor, unit: Unit, timeline: Timeline) -> Tensor:
    """MagCache's ratio of the residual y - x to the stored one, [1] on the device; 1 at the first step."""
    if not timeline.pushes:
        return torch.ones(1, device=y.device)
    stored: Any = unit.streams[0]
    return _magnitude(y, x, stored.views[0])


def predict(unit: Unit, hidden: Any, encoder: Any, weights: Any, returns: ReturnLayout) -> Any:
    """What the last block of a segment would return, from what its first one got. Traced by torch.compile.

    weights: of the values held, newest first; where compiled code or a guide has them on the device, theirs.
    """
    base, _, text, extras = unit.template
    streams = unit.streams
    if base is not True:
        if hidden.shape[1:] != unit.entry[1:]:
            raise Unfit(f"what enters has shape {tuple(hidden.shape)}, it had {tuple(unit.entry)}")
        if isinstance(base, torch.Size):
            hidden = turned(hidden, base)
    predicted = streams[0].predict(hidden if base else None, weights)
    if text:
        encoder = streams[1].predict(encoder, weights)
    if not extras.rest:
        return returns.build(predicted, encoder, {})
    further = [
        end_of(stream.predict(None, weights), hidden, unit.entry[0])
        for stream in streams[1 + text :]
    ]
    return returns.build(predicted, encoder, extras.build(further))
