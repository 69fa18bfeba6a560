# SPDX-License-Identifier: Apache-2.0
"""python -m bench.gpu.stage NAME FILE DEVICE LIMIT: one stage, in this process."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

import torch

from .. import systems
from .session import Session
from .table import chosen


def main(argv: list[str] | None = None) -> int:
    name, path, device, limit = sys.argv[1:] if argv is None else argv
    dies_after = int(os.environ.get("FASTCACHE_GPU_DIES_AFTER", "0"))
    session = Session(name, Path(path), device, float(limit), dies_after)
    if session.dry:
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    session.copy()
    with session.attempt("stage"), torch.no_grad(), systems.quietly():
        (stage,) = chosen([name])
        importlib.import_module(f"bench.gpu.{stage.module or name}").run(session)
    if session.failed:
        print(f"{name}: failed: {', '.join(session.failed)}", flush=True)
    return int(bool(session.failed))


if __name__ == "__main__":
    raise SystemExit(main())
