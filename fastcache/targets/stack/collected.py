# SPDX-License-Identifier: Apache-2.0
"""Whether a model holds on to what its blocks return, as a ControlNet does: skipped blocks would leave it without."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .layout import BlockList


class Returned:
    """What blocks have returned in one call that nothing would give in a reused step.

    early: several blocks run before the decision. The last one of them is kept, and the last one skipped is predicted.

    Of two blocks, what the first has returned is the second's argument, so that it is alive while that runs, whoever
    keeps it. Where the model loops over the list, the end of its loop shows: nothing but a collection has it then. Only
    where it is alive there too, or where no loop is seen, all containers of the process are gone through.
    """

    def __init__(self, lists: Sequence[BlockList], early: bool) -> None:
        self.lists, self.early = lists, early
        self.references: list[weakref.ref] = []
        self.around: set[int] = set()  # containers that these came in, by their id
        self.looped: set[int] = set()  # lists that the model is looping over
        self.open: int | None = None  # the list whose loop is to show it
        self.call: tuple[tuple, tuple] = ((), ())  # arguments of the last block, by their ids

    def note(self, at: int, index: int, value: Tensor, output: Any) -> None:
        """Block `index` of list `at` has returned this, as part of its output."""
        blocks, stop = self.lists[at], len(self.lists[at]) - 1 - self.lists[at].tail
        if index < blocks.head:
            lost = self.early and not (blocks.probed and index == blocks.head - 1)
        else:
            lost = index < stop + (blocks is not self.lists[-1])
        if lost:
            self.references.append(weakref.ref(value))
            self.around.update(_containers(output))

    def loop_begins(self, at: int) -> None:
        """The model begins to loop over a list."""
        if self.lists[at].loop_ends:
            self.looped.add(at)

    def loop_ends(self, at: int, ours: list[tuple]) -> bool:
        """The model's loop is through with a list; whether somebody keeps any of it. ours: as `collected` has it."""
        self.looped.discard(at)
        if self.open != at:
            return False
        self.open = None
        value = self.references.pop(0)()
        return value is not None and self._contained(value, ours)

    def unsettled(self) -> bool:
        """Whether a loop was left before its list had ended. The next call does not wait for that."""
        if self.open is None:
            return False
        self.lists[self.open].loop_ends = False
        return True

    def collected(self, at: int, args: tuple, kwargs: dict[str, Any], ours: list[tuple]) -> bool:
        """Whether somebody keeps any of it, the last block of list `at` having run with these arguments.

        ours: what is kept for another reason.
        """
        if self._held((args, kwargs, ours)):
            gc.collect()  # perhaps only in a cycle that nobody refers to
            return self._held((args, kwargs, ours))
        value = self.references[0]() if len(self.references) == 1 else None
        named, numbered = _ids(kwargs.values()), _ids(args)
        if value is None or value.requires_grad or id(value) not in (*named, *numbered):
            return False
        self.call = named, numbered
        if at in self.looped:
            self.open = at
            return False
        return self._contained(value, ours)

    def _contained(self, value: Tensor, ours: Any) -> bool:
        """Whether a container has it that is neither ours nor the last block's call."""
        known, (named, numbered) = self.around | set(_containers(ours)), self.call
        holders = [each for each in gc.get_referrers(value) if id(each) not in known]
        return any(
            isinstance(each, list)
            or (isinstance(each, dict) and _ids(each.values()) != named)
            or (
                isinstance(each, tuple)
                and not (numbered and _ids(each)[-len(numbered) :] == numbered)
            )
            for each in holders
        )

    def refusal(self) -> ValueError:
        """What is to be raised where it is collected."""
        return ValueError(
            f"target: the model keeps what each block of {[blocks.name for blocks in self.lists]} returns, as a "
            "ControlNet does, so they cannot be skipped together; skip modules instead: TaylorSeer, "
            "PyramidAttentionBroadcast, FasterCache, or a recipe with where=fastcache.Modules(...)"
        )

    def _held(self, alive: Any) -> bool:
        known = {id(v) for leaf in tree_leaves(alive) for v in (leaf, getattr(leaf, "_base", None))}
        values = [value for reference in self.references if (value := reference()) is not None]
        if any(value.requires_grad for value in values):
            return False  # autograd keeps what it needs of them
        return any(id(value) not in known for value in values)


def _containers(value: Any) -> Iterator[int]:
    """The ids of a container and of those in it."""
    if isinstance(value, list | tuple | dict):
        yield id(value)
        for each in value.values() if isinstance(value, dict) else value:
            yield from _containers(each)


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(id, values))
