# SPDX-License-Identifier: Apache-2.0
"""What a meter is: it measures the signal of one rule, and keeps what later steps are measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from ... import sync
from ...models.block_io import BlockIO
from ...ops.short import change_against
from ...policies import Policy, Step
from ...storage.group import SlotGroup
from ...storage.state import State
from ..guide import Guide


class SignalSlots(SlotGroup):
    """reference: the value that a change is measured against. form: its shape and dtype. sums: of the change, for a
    step in two parts. nothing: zeros, of which a value that is no residual is one. output: the model's, of the same
    step as the reference. kept_reference: a reference is there. slopes: how many outputs in a row were compared with
    the one before."""

    __slots__ = (
        "against",
        "form",
        "kept_reference",
        "nothing",
        "output",
        "reference",
        "slopes",
        "sums",
    )
    holds = ("reference", "sums", "nothing", "output")
    facts: ClassVar[dict[str, Any]] = {"kept_reference": False, "slopes": 0}
    forms = ("form", "against")
    reference: Any
    sums: Any
    nothing: Any
    output: Any
    kept_reference: bool
    slopes: int

    def __init__(self) -> None:
        super().__init__()
        self.form: tuple | None = None
        self.against: Callable[..., float | None] | None = None  # what compares with the reference

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        super().move(to)
        self.against = None if self.against is None else change_against(self.reference)


class Meter:
    """Measures one signal for one rule.

    One that looks at the arguments of a call has `of_call`, and decides before the model's forward begins; the
    others are shown tensors inside it, also by traced code. The number itself stays on the device until `read`.

    Class attributes: `needs_history` says that it measures only what the rule's full history explains;
    `at_input` that it is shown what the first block is called with, before that runs, and not what it returns;
    `at_output` that it is shown what the model returns too, of a computed step.
    """

    needs_history: ClassVar[bool] = False
    at_input: ClassVar[bool] = False
    at_output: ClassVar[bool] = False

    def __init__(self, when: Policy, rule: int, guide: Guide | None, model: Any = None) -> None:
        self.when, self.rule, self.guide, self.model = when, rule, guide, model
        self.signal = when.signal
        self.per_sample: bool = when.per_sample
        # the reference is that of the step before, whatever became of it
        self.every_step = when.signal is not None and when.signal.against == "previous"

    def of_call(self, step: Step, args: tuple, kwargs: dict) -> Tensor | None:
        """The value of a call that has not begun, for a signal that is there by then; None where it has none."""
        raise NotImplementedError

    def missed(self, state: State) -> None:
        """A call had no value: what was kept before is not to be compared with."""

    def of_output(self, state: State, output: Any) -> None:
        """Take note of what the model returns at a computed step, where `at_output`."""

    def of_block(self, io: BlockIO, block: Any, args: tuple, kwargs: dict) -> Tensor:
        """The value of a call of the first block that has not begun, where `at_input`."""
        raise NotImplementedError

    def measure(self, state: State, y: Tensor, x: Tensor | None) -> Tensor | None:
        """What the device gives for y, or for y - x; None where there is nothing to measure it against."""
        raise NotImplementedError

    def number(self, state: State, y: Tensor, x: Tensor | None) -> float | None:
        """The number for y, or for y - x, of this rank alone; None where there is nothing to measure it against."""
        measured = self.measure(state, y, x)
        return None if measured is None else self.read(measured, None)

    def keep(self, state: State, y: Tensor, x: Tensor | None) -> None:
        """Have later steps measured against y, or y - x."""

    def keep_again(self, state: State, value: Any) -> None:
        """The same in the second part of a step, of a value `at_input` that its first part has measured."""
        self.keep(state, value, None)

    def went_well(self, state: State) -> None:
        """Take what traced code has kept for valid, the step having been computed."""

    # --- a step in two parts ------------------------------------------------------------------------------

    def prepare_head(self, state: State) -> bool:
        """Make room for what the first part measures; False where there is nothing to measure it against."""
        return True

    def measure_head(self, state: State, y: Tensor, x: Tensor | None) -> None:
        """Measure, and leave the numbers in their place for the host to read."""
        self.measure(state, y, x)

    def left(self, state: State) -> Tensor:
        """What the first part has measured."""
        raise NotImplementedError

    # --- the number ---------------------------------------------------------------------------------------

    def shape(self, state: State) -> tuple[int, ...]:
        """Shape of what is measured, for a rank that has nothing to measure while the others wait for it."""
        return (1,)

    def read(self, measured: Tensor, group: Any) -> float:
        """The number, averaged over the ranks of a group; the one device read of a step."""
        return sync.mean(measured, group)
