# SPDX-License-Identifier: Apache-2.0
"""Tensors that one owner keeps for a run beside the histories of its values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor

from .allocate import static


class Keeps(Protocol):
    """Whatever keeps tensors in attributes of its own: a stream, or a group of slots.

    kept: names of the attributes that hold one now.
    """

    @property
    def kept(self) -> tuple[str, ...]: ...

    def make_static(self) -> None: ...

    def tensors(self) -> list[Tensor]: ...

    def move(self, to: Callable[[Tensor], Tensor]) -> None: ...

    def owners(self, label: str) -> Iterator[tuple[str, Keeps]]: ...


class SlotGroup:
    """Slots of one owner, as attributes: a subclass names them in `__slots__` and says what they are.

    Each is None until it is allocated, once; it is then written in place, so that compiled code may keep its
    address. What a slot holds is worth nothing until a fact says so.

    Class attributes: `holds` names the slots of one tensor; `parts` those of a stream or another group, given
    when the group is made or None until then; `facts` what the host knows of them, with its value while they
    hold nothing; `forms` what the host knows of how they lie, made with them and for as long.
    """

    __slots__ = ("told",)
    holds: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[dict[str, Any]] = {}
    forms: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **parts: Any) -> None:
        for name in self.holds:
            setattr(self, name, None)
        for name in self.parts:
            setattr(self, name, parts.get(name))
        self.told: dict[str, tuple[float, ...]] = {}  # what `put` has written
        self.forget()

    def forget(self) -> None:
        """Take nothing that is held for valid any more; the tensors are overwritten elsewhere."""
        self.told = {}
        for name, value in self.facts.items():
            setattr(self, name, value)
        for part in self._parts():
            part.forget()

    def put(self, name: str, values: tuple[float, ...]) -> None:
        """Write numbers into a small tensor, as arguments of kernels: nothing is copied to the device."""
        before = self.told.get(name, ())
        if values != before:
            slot = getattr(self, name)
            for i, value in enumerate(values):
                if before[i : i + 1] != (value,):
                    slot[i].fill_(value)
            self.told[name] = values

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the slots that are allocated."""
        return tuple(name for name in self.holds if getattr(self, name) is not None)

    def _parts(self) -> list[Any]:
        return [part for name in self.parts if (part := getattr(self, name)) is not None]

    def tensors(self) -> list[Tensor]:
        """All tensors, those of its parts included."""
        own = [getattr(self, name) for name in self.kept]
        return own + [t for part in self._parts() for t in part.tensors()]

    def owners(self, label: str) -> Iterator[tuple[str, Keeps]]:
        """Itself and its parts, each with a name."""
        yield label, self
        for name in self.parts:
            part = getattr(self, name)
            if part is not None:
                yield from part.owners(f"{label}.{name}")

    def make_static(self) -> None:
        """Tell compiled code that the tensors stay where they are."""
        for name in self.kept:
            static(getattr(self, name))
        for part in self._parts():
            part.make_static()

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep all tensors in other storage from now on."""
        for name in self.kept:
            setattr(self, name, to(getattr(self, name)))
        for part in self._parts():
            part.move(to)


@functools.cache
def numbered(count: int) -> type[SlotGroup]:
    """Groups of so many slots of one tensor, whose meaning is known to whoever makes one: `at0`, `at1`, ..."""
    names = tuple(f"at{i}" for i in range(count))
    return type(f"Numbered{count}", (SlotGroup,), {"__slots__": names, "holds": names})
