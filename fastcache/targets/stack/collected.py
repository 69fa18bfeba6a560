# SPDX-License-Identifier: Apache-2.0
"""Whether a model holds on to what its blocks return, as a ControlNet does: skipped blocks would leave it without."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

from torch.utils._pytree import tree_leaves


def collected(returned: Sequence[weakref.ref], alive: Any) -> bool:
    """Whether somebody keeps what blocks have returned.

    alive: what is kept for another reason, such as the arguments of the block that has just run.
    """
    known = {id(v) for leaf in tree_leaves(alive) for v in (leaf, getattr(leaf, "_base", None))}

    def held() -> bool:
        values = [value for reference in returned if (value := reference()) is not None]
        if any(value.requires_grad for value in values):
            return False  # autograd keeps what it needs of them
        return any(id(value) not in known for value in values)

    if held():
        gc.collect()  # perhaps only in a cycle that nobody refers to
    return held()
