"""A schedule known before step 0."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .policies import COMPUTE, REUSE


@dataclass(frozen=True)
class Plan(Sequence):
    """The actions of a run, one row per rule. As a sequence: per step "reuse" if any rule reuses."""

    rows: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]

    @property
    def actions(self) -> tuple[str, ...]:
        return tuple(
            REUSE if REUSE in column else COMPUTE for column in zip(*self.rows, strict=True)
        )

    @property
    def computed(self) -> tuple[int, ...]:
        """Indices of the steps on which nothing is reused."""
        return tuple(i for i, action in enumerate(self.actions) if action == COMPUTE)

    def digest(self) -> str:
        """A hash that ranks can compare."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows[0])

    def __getitem__(self, index: Any) -> Any:
        return self.actions[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.actions)

    def __str__(self) -> str:
        width = max(map(len, self.labels))
        lines = [f"{len(self.computed)} of {len(self)} steps computed (C), the others reused (.)"]
        lines += [
            f"{label:<{width}}  " + "".join("C" if a == COMPUTE else "." for a in row)
            for label, row in zip(self.labels, self.rows, strict=True)
        ]
        return "\n".join(lines)
