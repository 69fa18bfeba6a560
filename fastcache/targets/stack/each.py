# SPDX-License-Identifier: Apache-2.0
"""A call whose samples belong to different requests: what looks inside the stack looks at each sample by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...models.block_io import BlockIO
from ...storage.together import Group, Member, apart, joined
from ...storage.unit import Unit
from ..control import HEAD, Stop
from ..decide import RuleDecider, RuleSlots
from ..guide import Guide, GuideSlots
from ..meters.base import Meter, SignalSlots
from .layout import Stack
from .probe import ProbeSlots


class EachDecider:
    """Decides for each sample as a call of its own would."""

    def __init__(self, decider: RuleDecider, group: Group) -> None:
        self.decider, self.group = decider, group

    def measure(self, y: Any, x: Tensor | None) -> None:
        """Decide by y, or y - x. Samples that do not agree part here: what has run is the head of their steps."""
        decider, samples, control = self.decider, self.group.samples, self.decider.control
        values, bases = apart(y, len(samples)), apart(x, len(samples))
        if control.phase == HEAD:  # traced
            meter: Any = decider.meter
            for sample, value, base in zip(samples, values, bases, strict=True):
                meter.measure_head(sample.state, value, base)
            return
        measured = []  # of all samples, before the host waits for the first number
        for sample, value, base in zip(samples, values, bases, strict=True):
            sample.arm()
            measured.append(decider.measured(sample.state, value, base))
        if not self._agreed(measured):
            control.phase = HEAD

    def _agreed(self, measured: Sequence[Tensor | None]) -> bool:
        """Decide each sample by what was measured of it; whether all do the same."""
        group, samples, rule = self.group, self.group.samples, self.decider.index
        for sample, numbers in zip(samples, measured, strict=True):
            sample.arm()
            self.decider.decide_with(numbers)
            sample.note()
        group.weights[:] = weights_of(samples, rule)
        self.decider.control.state = group  # the decision of the last sample stays
        return len({sample.actions[rule] for sample in samples}) == 1

    # --- a compiled step in two parts ---------------------------------------------------------------------

    def prepare_head(self, state: Any) -> bool:
        ready = True
        for sample in self.group.samples:
            sample.arm()
            ready = self.decider.prepare_head(sample.state) and ready
        self.decider.control.state = self.group
        return ready

    def left_by_head(self, state: Any) -> list[Tensor]:
        return [self.decider.left_by_head(sample.state) for sample in self.group.samples]

    def decide_with(self, left: Sequence[Tensor]) -> None:
        """Decide by what the head has left. Raises Stop where samples do not agree."""
        if not self._agreed(left):
            raise Stop


class EachMeter:
    """Keeps of each sample what its later steps are held against."""

    def __init__(self, meter: Meter, group: Group) -> None:
        self.meter, self.group, self.at_input = meter, group, meter.at_input

    def of_block(self, io: BlockIO, block: Any, args: tuple, kwargs: dict) -> Any:
        return self.meter.of_block(io, block, args, kwargs)

    def keep(self, state: Any, y: Any, x: Tensor | None) -> None:
        samples = self.group.samples
        rows = zip(samples, apart(y, len(samples)), apart(x, len(samples)), strict=True)
        for sample, value, base in rows:
            self.meter.keep(sample.state, value, base)

    def keep_again(self, state: Any, value: Any) -> None:
        samples = self.group.samples
        for sample, row in zip(samples, apart(value, len(samples)), strict=True):
            self.meter.keep_again(sample.state, row)

    def went_well(self, state: Any) -> None:
        """Each state is told so when its step is accounted for."""


class EachGuide:
    """Keeps the guide of each sample, or reads its weights off it."""

    def __init__(self, guide: Guide, group: Group) -> None:
        self.predictor, self.of = guide.predictor, guide.of
        self.guide, self.group = guide, group

    def see(self, state: Any, rule: int, action: str, guide: Tensor) -> None:
        samples = self.group.samples
        for sample, row in zip(samples, apart(guide, len(samples)), strict=True):
            self.guide.see(sample.state, rule, action, row)


def looking(
    decider: RuleDecider, meter: Meter | None, guide: Guide | None, group: Group
) -> tuple[EachDecider, EachMeter | None, EachGuide | None]:
    """What looks at each sample, in the place of what looks at one."""
    return (
        EachDecider(decider, group),
        None if meter is None else EachMeter(meter, group),
        None if guide is None else EachGuide(guide, group),
    )


class Head(ProbeSlots):
    """What the first blocks have made of several samples, for those that go on alike. It lives for one call.

    returns_text: whether the last of these blocks gives back a text stream.
    """

    __slots__ = ("count", "returns_text")
    forms = (*ProbeSlots.forms, "count", "returns_text")

    def __init__(self, count: int = 0, returns_text: bool = False) -> None:
        super().__init__()
        self.count, self.returns_text = count, returns_text
        self.form = None  # as that of a signal without a reference: nothing is lacking

    def keep(self, hidden: Tensor, encoder: Any, more: Any, now: Tensor | None) -> None:
        self.hidden, self.now = hidden, now
        self.encoder = encoder if self.returns_text else None

    def give_back(self, x: Tensor, encoder: Any) -> tuple[Tensor, Any, Any, Tensor | None]:
        return self.hidden, self.encoder if self.returns_text else encoder, {}, self.now

    def some(self, places: Sequence[int]) -> Head:
        """That of the samples at these places."""
        head = Head(len(places), self.returns_text)
        for name in self.kept:
            rows = list(apart(getattr(self, name), self.count))
            setattr(head, name, torch.cat([rows[place] for place in places]))
        return head


def weights_of(samples: Sequence[Member], rule: int) -> list[Any]:
    """Of the prediction of each sample: on the host, or where its guide leaves them."""
    guides = [sample.state.slots[rule].guide for sample in samples]
    return [
        s.weights[rule] if guide is None else guide.weights
        for s, guide in zip(samples, guides, strict=True)
    ]


def returns_more(units: Mapping[Any, Unit]) -> bool:
    """Whether a segment returns what is no tensor, so that nothing says which samples it belongs to."""
    return any(leaf is not None for unit in units.values() for leaf in unit.template.extras.rest)


def group_of(
    stack: Stack, samples: Sequence[Member], head: Group | None, returns_text: bool
) -> Group | None:
    """The samples as one. head: of the call that has run the first blocks for these, and others."""
    rule = stack.rule
    group = joined(samples, rule, weights_of(samples, rule), stack.guide is not None)
    if group is None:
        return None
    if head is None:
        own = Head(len(samples), returns_text)
    else:
        places = [head.samples.index(sample) for sample in samples]
        own, group.way = head.slots[rule].own.some(places), head.way
    group.slots[rule] = RuleSlots(signal=SignalSlots(), guide=GuideSlots(), own=own)
    return group
