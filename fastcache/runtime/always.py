# SPDX-License-Identifier: Apache-2.0
"""Calls that have to run in full by what they are given, such as one that writes a cache of the model's own."""

from __future__ import annotations

from collections.abc import Sequence


class AlwaysComputes:
    """The arguments of one model that make a call compute where they are given.

    names: of the arguments. order: of the model's positional arguments.
    """

    def __init__(self, names: Sequence[str], order: Sequence[str]) -> None:
        self.names = {name: order.index(name) if name in order else -1 for name in names}
        self.places = set(self.names.values())

    def asked(self, args: tuple, kwargs: dict) -> bool:
        """Whether one of them is given."""
        for name, place in self.names.items():
            given = kwargs.get(name)
            if given is None and len(args) > place >= 0:
                given = args[place]
            if given is not None:
                return True
        return False

    def without(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A call with None in place of them: such calls belong to the run that goes on."""
        return (
            tuple(None if i in self.places else v for i, v in enumerate(args)),
            {k: None if k in self.names else v for k, v in kwargs.items()},
        )
