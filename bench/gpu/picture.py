# SPDX-License-Identifier: Apache-2.0
"""The second call: the picture model, trained on the GPU for a while and evaluated. See `COMMANDS`."""

from __future__ import annotations

import subprocess
import sys

from .. import common
from .session import Session

SECONDS = 150  # of training
# by stage: a file of this tree, and how it is called
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "train": (
        "train_picture",
        ["--device", "{device}", "--seconds", str(SECONDS), "--out", "{out}"],
    ),
    "evaluate": (
        "evaluate_picture",
        ["--device", "{device}", "--model", "{out}", "--json", "{json}"],
    ),
}


def run(session: Session) -> None:
    name, arguments = COMMANDS[session.stage]
    if not (common.ROOT / "bench" / f"{name}.py").exists():
        session.row(session.stage, skipped=f"bench/{name}.py is not in this tree")
        return
    out = session.path.parent / "picture"
    out.mkdir(exist_ok=True)
    places = {"device": session.device, "out": out, "json": session.path.parent / "picture.jsonl"}
    command = [sys.executable, "-m", f"bench.{name}", *(a.format(**places) for a in arguments)]
    session.row(session.stage, started=True)
    code = subprocess.run(command, cwd=common.ROOT).returncode
    if code:
        session.fail(session.stage, f"exit {code}")
    else:
        session.row(session.stage, files=sorted(p.name for p in out.iterdir()))
