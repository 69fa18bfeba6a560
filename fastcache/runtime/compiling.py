# SPDX-License-Identifier: Apache-2.0
"""Being told that torch.compile is about to trace something, and running uncompiled what must not be."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from typing import Any, Protocol

import torch


class Listener(Protocol):
    """Who wants to be told when something is traced."""

    def graph_begins(self) -> None:
        """Called when torch.compile is about to trace something."""


listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def watch_compiling() -> bool:
    """Be told when torch.compile is about to trace something; torch._dynamo.reset() forgets who asked.

    Returns whether anything can be traced yet.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    handler = dynamo.callback_handler
    if _tell not in handler.start_callbacks:
        handler.register_start_callback(_tell)
    return True


def _tell(*_: Any) -> None:
    for listener in tuple(listeners):
        listener.graph_begins()


class Eager:
    """Runs whatever the user has compiled uncompiled. Torch's stance is one for all threads, and those who want
    it changed do not end in the order in which they began: the last one out puts it back."""

    def __init__(self) -> None:
        self.lock, self.holders = threading.Lock(), 0
        self.stance: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if not self.holders:
                self.stance = torch.compiler.set_stance("force_eager")
                self.stance.__enter__()
            self.holders += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.holders -= 1
            if not self.holders:
                self.stance.__exit__(None, None, None)


eager, NOTHING = Eager(), contextlib.nullcontext()


def eagerly(wanted: bool) -> contextlib.AbstractContextManager:
    """Run whatever is compiled uncompiled: calls that allocate storage are not for graphs."""
    return eager if wanted and "torch._dynamo" in sys.modules else NOTHING
