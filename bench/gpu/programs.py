# SPDX-License-Identifier: Apache-2.0
"""What a step asks of the host: reads that stop it, graphs that are not captured; and their tests."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

import fastcache

from .. import catalogue, common
from ..common import Row
from ..contenders import Contender, schedule
from ..models import Subject
from . import flux, tests
from .session import Session

TOKENS = 1024
WANTED = (
    ("fastcache", "MagCache", ""),
    ("fastcache", "FirstBlock", ""),
    ("fastcache", "Taylor on the stack", ""),
    ("fastcache", "Guided", ""),
    ("diffusers", "MagCache", ""),
    ("diffusers", "FirstBlock", ""),
    catalogue.UNCACHED,
)


def run(session: Session) -> None:
    subject = flux.build(session, "flux-slice", TOKENS)
    found = catalogue.eager(subject)
    for label in (w for w in WANTED if w in found):
        columns = dict(zip(("system", "method"), label, strict=False))
        with session.attempt("reads", **columns):
            session.row("reads", **columns, **reads(found[label](), subject, session.device))
    skips(session)
    tests.run(session, ["test_compile_gpu"])


def reads(contender: Contender, subject: Subject, device: str) -> Row:
    """How often each kind of step makes the host wait for the device, and where."""
    plan = schedule(len(subject.calls))
    flux.whole_run(contender, subject, device)
    counts: dict[bool, list[int]] = {True: [], False: []}
    places = Counter[str]()
    for i, computes in enumerate(plan):
        contender.announce(i, plan)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                contender.step(subject, i)
            finally:
                if device != "cpu":
                    torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in said if "synchronizing" in str(w.message)]
        counts[computes].append(len(waits))
        places.update(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    contender.reset()
    return {
        "computed": counts[True],
        "reused": counts[False],
        "places": dict(places.most_common(6)),
    }


def skips(session: Session) -> None:
    """Graphs that Inductor declines to capture, by method, on the model of the tests."""
    if session.dry:
        session.row("skips", skipped="needs a GPU")
        return
    sys.path[:0] = [str(common.ROOT / "tests"), str(common.ROOT / "tests" / "graphs")]
    from test_compile import PlainModel, fresh
    from test_compile_gpu import METHODS
    from test_compile_gpu import run as play

    for method, make in METHODS.items():
        with session.attempt("skips", method=method):
            fresh()
            model = PlainModel(64).cuda().eval().requires_grad_(False)
            start, drift = torch.randn(1, 32, 64).cuda(), torch.randn(1, 32, 64).cuda()
            with fastcache.enable(model, make()) as cache:
                compiled = fastcache.compile(model, cudagraphs=True)
                for _ in range(2):
                    play(cache, compiled, start, drift)
            counters = torch._dynamo.utils.counters
            session.row(
                "skips",
                method=method,
                skips=counters["inductor"]["cudagraph_skips"],
                graphs=counters["stats"]["unique_graphs"],
            )
