# SPDX-License-Identifier: Apache-2.0
"""python -m bench.gpu [NAME ...]: run stages, each in a process of its own that is killed at its limit.

Started by bench/gpu.sh, which sets up what they need. NAME is a stage, `first` (default) or `second`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import fastcache

from .. import common
from .session import Session
from .table import Stage, chosen

BUILD = 60.0  # seconds
PATIENCE = 10  # times its limit that a dry stage may take: the limits are those of a GPU
LEAST = 5.0  # seconds that are worth starting a stage for


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    p.add_argument("names", nargs="*")
    p.add_argument("--out", type=Path, required=True, help="folder of results")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--until", type=float, help="seconds since 1970 at which all must have ended")
    p.add_argument(
        "--repo", type=Path, help="sources, to build the extension where it does not load"
    )
    p.add_argument("--kit", type=Path, help="what `kit unpack` said")
    args = p.parse_args(argv)
    path = args.out / f"gpu-{label(args.device)}.jsonl"
    session = Session("run", path, args.device)
    if args.kit is not None:
        said = json.loads(args.kit.read_text())
        session.row("kit", **said)
    until = args.until or time.time() + 24 * 3600
    failed = build(args.repo, session) if args.repo and args.device == "cuda" else []
    failed += run(chosen(args.names), session, until)
    print(f"== results in {path}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def build(repo: Path, session: Session) -> list[str]:
    """The libraries, where no CUDA library was carried or it does not load; the last stage has less time then."""
    reason = fastcache.ops.dispatch.status("cuda")
    if reason is True:
        return []
    into = Path(fastcache.__file__).parents[1]
    major, minor = torch.cuda.get_device_capability()
    switches = {"FASTCACHE_BUILD_CUDA": "1"}
    switches["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
    command = [*pip, "--no-build-isolation", "--target", str(into), str(repo)]
    start = time.monotonic()
    failure = watch(command, BUILD, os.environ | switches)
    session.row("build", because=str(reason), seconds=time.monotonic() - start, failure=failure)
    return [f"build ({failure})"] if failure else []


def label(device: str) -> str:
    """What files are called after."""
    name = "dry" if device == "cpu" else common.environment(device)["device"]
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def run(stages: Sequence[Stage], session: Session, until: float) -> list[str]:
    """The stages that failed; every stage has a row that says how it ended."""
    failed = []
    for stage in stages:
        limit = min(stage.limit * (PATIENCE if session.dry else 1), until - time.time())
        if limit < LEAST:
            reason, seconds = "no time left", 0.0
        else:
            print(f"== {stage.name}: {stage.brings} (at most {limit:.0f} s)", flush=True)
            start = time.monotonic()
            reason = watch(command(stage, session, limit), limit)
            seconds = time.monotonic() - start
        if reason:
            failed.append(f"{stage.name} ({reason})")
        ended = {"ok": not reason, "seconds": seconds, "limit": limit}
        session.row("stage", of=stage.name, **ended, **({"reason": reason} if reason else {}))
    return failed


def command(stage: Stage, session: Session, limit: float) -> list[str]:
    """What runs one stage."""
    given = [stage.name, str(session.path), session.device, str(limit)]
    return [sys.executable, "-m", "bench.gpu.stage", *given]


def watch(command: Sequence[str], limit: float, env: dict[str, str] | None = None) -> str:
    """Why a command failed, or nothing. It is killed with all its children at the limit."""
    process = subprocess.Popen(command, start_new_session=True, env=env)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"killed after {limit:.0f} s"
    finally:
        _end(process)
    if code < 0:
        return f"signal {-code}"
    return f"exit {code}" if code else ""


def _end(process: subprocess.Popen) -> None:
    """What a stage leaves behind would run into the next one."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
