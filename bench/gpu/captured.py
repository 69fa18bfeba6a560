# SPDX-License-Identifier: Apache-2.0
"""Whole runs of FLUX.1 whose reused steps are captured: computed ones eager, or with compiled blocks."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import fastcache

from ..catalogue import BLOCKS, blocks_alone, ours, recompiled
from ..contenders import Contender
from ..models import Subject
from . import flux
from .regional import backend
from .session import Session, brief

METHODS = ("MagCache", "FirstBlock")
REUSE = "captured reuse"


def run(session: Session) -> None:
    subject = flux.build(session)
    for regional in (False, True):
        for method in METHODS:
            how = f"{REUSE}, {BLOCKS}" if regional else REUSE
            blocks = backend(session) if regional else ""
            try:
                made = captured(subject, method, how, blocks)
            except (TypeError, ValueError) as error:  # not in this version, or not on this device
                columns = {"system": "fastcache", "method": method, "compiled": how}
                session.row("run", **columns, skipped=f"not available: {brief(error)}")
            else:
                flux.measure(session, subject, partial(_given, made), ("fastcache", method, how))


def _given(made: Contender) -> Contender:
    return made


def captured(subject: Subject, method: str, how: str, blocks: str) -> Contender:
    """One of our methods, its reuse and head programs captured. blocks: a compiler for the others."""

    def compile(model: Any) -> Any:
        if blocks:
            blocks_alone(model, backend=blocks, fullgraph=True)
        return fastcache.compile(model, cudagraphs=takes_reuse())

    return recompiled(ours(subject, method), how, compile)


def takes_reuse() -> Any:
    """The value that asks for captured reuse; a version that takes a bool would capture all steps."""
    if inspect.signature(fastcache.compile).parameters["cudagraphs"].annotation == "bool":
        raise TypeError("fastcache.compile knows cudagraphs=True alone, not 'reuse'")
    return "reuse"
