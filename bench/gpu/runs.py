# SPDX-License-Identifier: Apache-2.0
"""Whole runs of FLUX.1, eager, on one schedule: ours, the peers, and what bounds them."""

from __future__ import annotations

from .. import catalogue
from ..contenders import FLOORS
from . import flux
from .session import Session

WANTED = (
    catalogue.UNCACHED,
    ("fastcache", "MagCache", ""),
    ("diffusers", "MagCache", ""),
    ("fastcache", "FirstBlock", ""),
    ("diffusers", "FirstBlock", ""),
    ("cache-dit", "FirstBlock", ""),
    ("fastcache", "Taylor on the stack", ""),
    ("cache-dit", "Taylor on the stack", ""),
    ("fastcache", "Guided", ""),
    *(("uncached", floor, "") for floor in FLOORS.values()),
)


def run(session: Session) -> None:
    subject = flux.build(session)
    flux.measure_all(session, subject, catalogue.eager(subject), WANTED)
    session.copy()
