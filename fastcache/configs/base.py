# SPDX-License-Identifier: Apache-2.0
"""What configs share.

A config is sugar: `recipe()` says what it means as rules of when × what × where. Fields are checked when
the object is built and again by `recipe()`, since they can be assigned in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from ..checks import identifiers, interval_of, whole
from ..recipe import Recipe

# The guards of `Policy` stay off in documented methods, which have none, so that schedules equal diffusers'.
BARE: dict[str, Any] = {"warmup": 0, "max_skips": 0, "last": False}


class Config:
    """Shared behaviour of the configs.

    `wants_timestep`: whether the method needs the running timestep, from `timestep_callback` or from a
    pipeline that has `current_timestep`.
    """

    wants_timestep: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field.

        Raises:
            TypeError: a field is of another type; the message names it.
            ValueError: a field is out of its range; the message names it.
        """
        raise NotImplementedError

    def recipe(self) -> Recipe:
        """The rules that this config stands for.

        Returns:
            A recipe without guards, named after the config.
        Raises:
            TypeError, ValueError: as `validate`, of a field that was assigned in between.
        """
        raise NotImplementedError

    @property
    def timestep_callback(self) -> Callable[[], Any] | None:
        """What returns the timestep of the running step; None where the config has no such field."""
        return None

    @property
    def warning(self) -> str | None:
        """What the user should know about the defaults taken; None: nothing."""
        return None

    def _name(self) -> str:
        return type(self).__name__

    def _whole(
        self, low: int, *names: str, optional: bool = False, high: int | None = None
    ) -> None:
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None):
                whole(self._name(), name, value, low, high)

    def _ranges(self, *names: str) -> None:
        for name in names:
            interval_of(self._name(), name, getattr(self, name))

    def _identifiers(self, *names: str, optional: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None):
                identifiers(self._name(), name, value)

    def _callables(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{self._name()}: {name} is {value!r}, must be callable or None")
