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
# The role of the block that always runs.
PROBED = {WHOLE: "run_first", HEAD: "run_first", REST: "restore_first"}


def roles_of(
    action: str,
    phase: str,
    blocks: Sized,
    *,
    opens: bool,
    closes: bool,
    probed: bool,
    loop_does_more: bool,
    asks: bool = False,
) -> list[str]:
    """What a list of blocks hands out, in order: fewer items than blocks where one stands for many.

    Compiled code guards what is asked for here: `blocks` are counted only where each of them has a role.
    action: anything but a reuse computes. opens, closes: the list opens or closes a segment. probed: its first
    block is the one that always runs. asks: what enters its first block decides, where that is still open.
    loop_does_more: the model's loop has to call every block.
    """
    if action == REUSE and not loop_does_more:
        first = [PROBED[phase]] if probed else []
        return [*first, "predict_segment"] if opens else first
    roles = CALLED if action == REUSE else COMPUTED
    opening, between, closing = roles
    handed = [between] * len(blocks)
    if closes:
        handed[-1] = closing
    if opens:
        handed[0] = ALONE[roles] if closes and len(blocks) == 1 else opening
    if probed:
        handed[0] = PROBED[phase]
    elif asks and action not in (COMPUTE, REUSE):
        handed[0] = ASKING
    return handed


class BlockStandIn:
    """What a list hands out in place of a block: called like it, and with its attributes."""

    def __init__(self, run: Callable, block: nn.Module) -> None:
        self.run, self.block = run, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)
