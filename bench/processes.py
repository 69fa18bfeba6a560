# SPDX-License-Identifier: Apache-2.0
"""A benchmark in several processes, and the medians of what they say.

Where the objects of a process happen to lie moves all of its times by several percent, however often it repeats them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .common import ROOT, Row


def rows_of(name: str, processes: int, options: Sequence[str]) -> list[list[Row]]:
    """The rows that a benchmark writes with these options, of so many processes, one after the other."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        for _ in range(processes):
            command = [sys.executable, "-m", "bench", name, *options, "--json", str(out)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            found.append([json.loads(line) for line in out.read_text().splitlines()])
    return found


def medians(runs: Sequence[Sequence[Row]], fields: Sequence[str]) -> list[Row]:
    """Rows whose fields are the medians of those in the same place of every run, where they have them."""
    rows: list[Row] = []
    for same in zip(*runs, strict=True):
        found = {f: statistics.median(row[f] for row in same) for f in fields if f in same[0]}
        rows.append(same[0] | found | {"processes": len(runs)})
    return rows
