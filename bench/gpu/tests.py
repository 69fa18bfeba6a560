# SPDX-License-Identifier: Apache-2.0
"""The project's tests for a GPU, as rows: every failure when it happens, counts at the end.

Also a plugin of pytest: `-p bench.gpu.tests` in the process that the stage starts.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .. import common
from .session import Session

WORKERS = 12
SPARE = 6.0  # seconds of a stage left for the last row


def run(session: Session, files: list[str]) -> None:
    """Run test files until they end or the stage nearly does."""
    here = {path.stem: path for path in (common.ROOT / "tests").rglob("test_*.py")}
    if missing := [name for name in files if name not in here]:
        session.fail("tests", f"not in this tree: {', '.join(missing)}")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu.tests"]
    if not session.dry and importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
    told = {"stage": session.stage, "path": session.path, "device": session.device}
    environment = os.environ | {f"FASTCACHE_GPU_{k.upper()}": str(v) for k, v in told.items()}
    process = subprocess.Popen(
        [*command, *(here[name] for name in files)], cwd=common.ROOT, env=environment
    )
    try:
        code: Any = process.wait(max(1.0, session.left() - SPARE))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it then writes what it has counted
        process.wait(SPARE)
        code = "no time left"
    if code:
        session.failed.append(f"tests ({code})")


# --- the plugin -----------------------------------------------------------------------------------------


class Rows:
    """Counts outcomes and keeps failures."""

    def __init__(self, session: Session) -> None:
        self.session, self.counts, self.start = session, Counter[str](), time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            found = [line for line in text if line.startswith("E ")] or text[-1:]
            self.session.row("test", test=report.nodeid, error=" ".join(found)[:400])

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        seconds = time.monotonic() - self.start
        self.session.row("tests", **self.counts, seconds=seconds, exit=int(exitstatus))


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # the one process that hears of every test
        told = [os.environ[f"FASTCACHE_GPU_{name}"] for name in ("STAGE", "PATH", "DEVICE")]
        config.pluginmanager.register(Rows(Session(told[0], Path(told[1]), told[2])))
