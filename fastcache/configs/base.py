"""The five documented configs, with the fields, types and defaults of diffusers 0.42.1.

A config is sugar: `recipe()` says what it means as rules of when × what × where. Fields are checked when
the object is built and again by `recipe()`, since they can be assigned in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checks import identifiers, interval_of, whole
from ..recipe import Recipe

# Guards that a documented method does not have; they stay off so that schedules equal diffusers'.
BARE: dict[str, Any] = {"warmup": 0, "max_skips": 0, "last": False}


class Config:
    """Shared behaviour of the five configs."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise a TypeError or ValueError that names the field unless every field makes sense."""
        raise NotImplementedError

    def recipe(self) -> Recipe:
        """The rules that this config stands for."""
        raise NotImplementedError

    @property
    def timestep_callback(self) -> Callable[[], Any] | None:
        return getattr(self, "current_timestep_callback", None)

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
