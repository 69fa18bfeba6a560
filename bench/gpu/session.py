# SPDX-License-Identifier: Apache-2.0
"""What a stage is given: rows that are kept the moment they are measured, and the machine."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import common
from ..common import Row

COPY = 4 * 10**9  # bytes read, and as many written


@dataclass
class Session:
    """One stage of one run.

    Args:
        stage: its name, a column of every row.
        path: the file of JSON lines that rows are appended to.
        device: "cuda", or "cpu" for a dry run: the same steps, tiny.
        limit: seconds until the stage is killed.
        dies_after: rows after which the process kills itself, for the tests.
    """

    stage: str
    path: Path
    device: str
    limit: float = 3600.0
    dies_after: int = 0
    failed: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    written: int = 0

    def __post_init__(self) -> None:
        self.origin = common.environment(self.device)

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds until this stage is killed."""
        return self.limit - (time.monotonic() - self.started)

    def row(self, name: str, **values: Any) -> None:
        """Keep one measurement. It is on disk when this returns."""
        if clash := self.origin.keys() & values.keys():
            raise ValueError(f"row {name!r}: {sorted(clash)} say where a row comes from")
        row: Row = {"bench": "gpu", "stage": self.stage, "name": name, **values}
        common.write_lines(self.path, [row | self.origin], append=True)
        shown = ", ".join(f"{k} {_short(v)}" for k, v in values.items())
        print(f"{self.stage}: {name}: {shown}"[:240], flush=True)
        self.written += 1
        if self.written == self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def fail(self, name: str, reason: object, **values: Any) -> None:
        """Keep a failure; the stage goes on, and the run says so at its end."""
        self.failed.append(name)
        self.row(name, **values, error=brief(reason))

    @contextmanager
    def attempt(self, name: str, **values: Any) -> Iterator[None]:
        """What goes wrong inside is a row, and what comes next still runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(name, error, **values)

    def copy(self) -> None:
        """The machine's speed of now: first in every stage, so that a drift shows."""
        with self.attempt("copy"):
            self.row("copy", gbps=copy_speed(self.device, 10**6 if self.dry else COPY))


def copy_speed(device: str, nbytes: int, rounds: int = 5) -> float:
    """GB/s of a copy between two buffers of `nbytes`, bytes read and written counted."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = common.interleaved({"copy": lambda: target.copy_(source)}, rounds, device, repeat=2)
    return 2 * nbytes / common.quantiles(samples["copy"])["p50"] / 1e9


def brief(reason: object) -> str:
    """A failure in one line."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    kind = f"{type(reason).__name__}: " if isinstance(reason, BaseException) else ""
    return (kind + (lines[0] if lines else ""))[:300]


def times(samples: Sequence[float], scale: float = 1e6, unit: str = "us") -> Row:
    """Quantiles of seconds as columns, in microseconds unless told otherwise."""
    return {f"{unit}_{p}": v * scale for p, v in common.quantiles(samples).items()}


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
