# SPDX-License-Identifier: Apache-2.0
"""Runs a test file once more where Triton interprets, which it decides when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


def _version(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version(package).split(".")[:2])
    except metadata.PackageNotFoundError:
        return (0, 0)


# marks the test that starts the child, and what runs in the child alone
starts_interpreter = pytest.mark.skipif(
    INTERPRETS
    or _version("triton") == (0, 0)
    or (_version("triton") < (3, 7) and _version("numpy") >= (2, 4)),
    reason="no triton here whose interpreter works, or it is running already",
)
in_interpreter = pytest.mark.skipif(not INTERPRETS, reason="runs in the child process")


def run_interpreted(file: str, *options: str) -> None:
    """All tests of a file in a child process; fails with what it says, and where it ran nothing."""
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    child = subprocess.run(
        [*pytest_alone, *options, file], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout
