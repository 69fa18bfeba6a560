# SPDX-License-Identifier: Apache-2.0
"""Whole runs of FLUX.1 with its repeated blocks compiled, and everything around them eager."""

from __future__ import annotations

from .. import catalogue
from ..catalogue import BLOCKS
from . import flux
from .session import Session

WANTED = (
    ("uncached", "uncached", BLOCKS),
    ("fastcache", "MagCache", BLOCKS),
    ("fastcache", "FirstBlock", BLOCKS),
)


def run(session: Session) -> None:
    subject = flux.build(session)
    found = catalogue.compiled(subject, backend=backend(session))
    flux.measure_all(session, subject, found, WANTED)


def backend(session: Session) -> str:
    """A dry run compiles nothing: Dynamo traces, and the graph runs as it is."""
    return "eager" if session.dry else "inductor"
