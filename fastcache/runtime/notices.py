# SPDX-License-Identifier: Apache-2.0
"""What a cache has to say: warnings, each of a kind once, and a log."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

LOG = logging.getLogger("fastcache")
LOG.addHandler(logging.NullHandler())  # an application that wants it configures logging

# Frames of these folders are never where a user's own code stands.
WITHIN = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).parent.parent, Path(torch.__file__).parent)
)


class FastcacheWarning(UserWarning):
    """Every warning of fastcache is one, so that a filter can name them."""


_quiet: ContextVar[bool] = ContextVar("fastcache_quiet", default=False)


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing is warned of or logged as a warning: around runs of settings that are only tried."""
    before = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(before)


def warn(message: str) -> None:
    """Warn, and log the same; the place it names is the first one outside fastcache and torch."""
    if _quiet.get():
        return
    LOG.warning(message)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(WITHIN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FastcacheWarning, stacklevel=level)


class Notices:
    """The warnings of one cache."""

    __slots__ = ("_said", "waiting")

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.waiting: list[str] = []

    def once(self, message: str) -> None:
        """Warn now, unless the same was said before."""
        if message not in self._said:
            self._said.add(message)
            warn(message)

    def later(self, kind: str, message: str) -> None:
        """Warn at the next `emit`, once per kind: when an error made of a warning breaks nothing."""
        if kind not in self._said:
            self._said.add(kind)
            self.waiting.append(message)

    def emit(self) -> None:
        """Warn of what has waited."""
        while self.waiting:
            warn(self.waiting.pop(0))
