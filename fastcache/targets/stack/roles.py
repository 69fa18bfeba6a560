# SPDX-License-Identifier: Apache-2.0
"""Which role stands in which block's place, as a table; and what a list hands out for a role."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

from torch import nn

from ...policies import COMPUTE, REUSE
from ..control import HEAD, REST, WHOLE

# The roles, by the names of the methods of `BlockListHook` that play them; "" is the block itself.
BLOCK = ""
ROLES = (
    "first",
    "last",
    "only",
    "decide_first",
    "run_head",
    "run_first",
    "restore_first",
    "predict_segment",
    "pass_through",
    "enter_segment",
    "leave_segment",
)
# Roles of a list's first block, where its segment opens, of the blocks between, and of its last one, where
# its segment closes: on computed steps, and on reused ones whose loop calls every block.
COMPUTED = ("first", BLOCK, "last")
CALLED = ("enter_segment", "pass_through", "leave_segment")
# The role of a block that opens and closes its segment alone.
ALONE = {COMPUTED: "only", CALLED: "predict_segment"}
# The role of the first block where what enters it decides.
ASKING = "decide_first"
# The role of the first of several blocks that always run, where what enters it is looked at.
OPENING = "run_head"
# The role of the block that always runs and is looked at, the last one of them.
PROBED = {WHOLE: "run_first", HEAD: "run_first", REST: "restore_first"}


def roles_of(
    action: str,
    phase: str,
    blocks: Sized,
    *,
    opens: bool,
    closes: bool,
    head: int,
    probed: bool,
    loop_does_more: bool,
    asks: bool = False,
    tailed: bool = False,
    watched: bool = False,
    opening: bool = False,
) -> list[str]:
    """What a list of blocks hands out, in order: fewer items than blocks where one stands for many.

    Compiled code guards what is asked for here: `blocks` are counted only where each of them has a role. Those that
    always run after the segment are not among them.
    action: anything but a reuse computes. opens, closes: the list opens or closes a segment. head: how many of its
    first blocks always run. probed: the last one of these is looked at. watched: some list's is. opening: what enters
    the first of them is looked at. asks: what enters the first block decides, where that is still open.
    tailed: blocks of this list run after the segment.
    loop_does_more: the model's loop has to call every block.
    """
    always = _head_roles(phase, head, probed, watched, opening)
    if action == REUSE and not loop_does_more:
        if opens and tailed:  # whose loop may count: blocks behind the segment keep their places
            return [*always, "predict_segment"] + ["pass_through"] * (len(blocks) - len(always) - 1)
        return [*always, "predict_segment"] if opens else always
    roles = CALLED if action == REUSE else COMPUTED
    first, between, closing = roles
    handed = always + [between] * (len(blocks) - len(always))
    if closes:
        handed[-1] = closing
    if opens and not probed:
        single = closes and len(blocks) - len(always) == 1
        handed[len(always)] = ALONE[roles] if single else first
    if asks and action not in (COMPUTE, REUSE):
        handed[0] = ASKING
    return handed


def _head_roles(phase: str, head: int, probed: bool, watched: bool, opening: bool) -> list[str]:
    """The roles of the blocks that always run before a segment, as `roles_of` has it."""
    roles = ["pass_through" if watched and phase == REST else BLOCK] * head
    if opening and head:
        roles[0] = OPENING
    if probed:
        roles[-1] = PROBED[phase]
    return roles


class BlockStandIn:
    """What a list hands out in place of a block: called like it, and with its attributes.

    run: gets what it is called with, a tuple and a dict.
    """

    def __init__(self, run: Callable[[tuple, dict], Any], block: nn.Module) -> None:
        self.run, self.block = run, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)
