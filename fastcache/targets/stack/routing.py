"""What a block list hands out when the model iterates over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..install import refuse_copy

GATE = "_fastcache_gate"


class Routing:
    """Mixed into the class of a block list while a cache is attached to it."""

    __reduce_ex__ = refuse_copy

    def __iter__(self) -> Iterator:
        gate = self.__dict__.get(GATE)
        if gate is not None and gate.owner.control.active:
            return gate.owner.route(gate)
        return super().__iter__()  # type: ignore[misc]

    def __getitem__(self, index: Any) -> Any:
        gate = self.__dict__.get(GATE)
        if gate is not None and gate.owner.control.active:
            return gate.owner.pick(gate, index)
        return super().__getitem__(index)  # type: ignore[misc]
