# SPDX-License-Identifier: Apache-2.0
"""One captured graph per mode of the whole model; then, with time left, the memory checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import fastcache

from .. import common
from ..catalogue import ours, recompiled
from . import flux
from .session import Session

HOW = "compile(cudagraphs=True, frozen=True)"
LEAST = 25.0  # seconds that a sanitizer needs to say anything
CLEAN, FOUND = 0, 9


def run(session: Session) -> None:
    subject = flux.build(session)
    session.row("start", compiled=HOW, limit=session.limit)  # compiling may take all of it
    options = {"backend": "eager"} if session.dry else {"cudagraphs": True}
    compile = partial(fastcache.compile, frozen=True, **options)
    label = ("fastcache", "MagCache", HOW)
    flux.measure(
        session, subject, lambda: recompiled(ours(subject, "MagCache"), HOW, compile), label
    )
    sanitize(session)


def sanitize(session: Session) -> None:
    """Every op under compute-sanitizer, where there is one and time for it."""
    tool = sanitizer()
    if session.dry or tool is None or session.left() < LEAST:
        reason = "no time left" if tool and not session.dry else "no compute-sanitizer here"
        session.row("sanitizer", skipped=reason)
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), "--print-limit", "5"]
    with session.attempt("sanitizer"):
        done = subprocess.run(
            [*command, sys.executable, "-m", "bench.exercise"],
            cwd=common.ROOT,
            capture_output=True,
            text=True,
            timeout=session.left() - 3,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        lines = (done.stdout + done.stderr).splitlines()
        row = {"tool": "memcheck", "exit": done.returncode, "said": lines[-6:]}
        if done.returncode == CLEAN:
            session.row("sanitizer", **row)
        else:
            session.fail("sanitizer", f"exit {done.returncode}", **row)


def sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return found or (str(places[0]) if places else None)
