# SPDX-License-Identifier: Apache-2.0
"""A schedule known before step 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from .policies import COMPUTE, REUSE, Action


@dataclass(frozen=True)
class Plan(Sequence[Action]):
    """The actions of a run, one row per rule; made by `Recipe.plan`.

    As a sequence it has one entry per step: "reuse" where any rule reuses, "compute" elsewhere.

    Args:
        rows: per rule the action of every step, [rules, steps].
        labels: per rule its parts in words.
    """

    rows: tuple[tuple[Action, ...], ...]
    labels: tuple[str, ...]

    @property
    def actions(self) -> tuple[Action, ...]:
        """Per step, what the rules together do."""
        return tuple(
            REUSE if REUSE in column else COMPUTE for column in zip(*self.rows, strict=True)
        )

    @property
    def computed(self) -> tuple[int, ...]:
        """Indices of the steps on which nothing is reused."""
        return tuple(i for i, action in enumerate(self.actions) if action == COMPUTE)

    def __len__(self) -> int:
        return len(self.rows[0])

    @overload
    def __getitem__(self, index: int) -> Action: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Action, ...]: ...

    def __getitem__(self, index: int | slice) -> Action | tuple[Action, ...]:
        return self.actions[index]

    def __iter__(self) -> Iterator[Action]:
        return iter(self.actions)

    def __str__(self) -> str:
        width = max(map(len, self.labels))
        lines = [f"{len(self.computed)} of {len(self)} steps computed (C), the others reused (.)"]
        lines += [
            f"{label:<{width}}  " + "".join("C" if a == COMPUTE else "." for a in row)
            for label, row in zip(self.labels, self.rows, strict=True)
        ]
        return "\n".join(lines)
