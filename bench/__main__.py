# SPDX-License-Identifier: Apache-2.0
"""python -m bench NAME ...: run one benchmark, or `report`."""

from __future__ import annotations

import importlib
import sys

NAMES = {
    "ops": "each cache op against eager chains and torch.compile",
    "overhead": "Python cost of a skipped step",
    "engines": "Python cost of a reused step under cache-dit",
    "steps": "latency and memory of computed and reused steps",
    "quality": "speed and quality of every method on the trained model",
    "tune": "what fastcache.tune finds: against the full sweep, and against solvers at equal time",
    "graphs": "torch.compile: graphs, breaks, recompiles",
    "guards": "what warm-up, last step and cap are worth on the trained model",
    "pictures": "one picture of the model that draws from words: uncached, cached, fewer steps",
    "load": "requests per second and latency of many users at once; --soak: random traffic, checked",
    "soak": "memory of a long run with requests coming and going",
    "report": "render bench/results: tables of README and docs, one HTML page",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in NAMES:
        print("usage: python -m bench NAME [options]; NAME is one of")
        for name, what in NAMES.items():
            print(f"  {name:<10}{what}")
        return 0 if argv in ([], ["-h"], ["--help"]) else 2
    return importlib.import_module(f"bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
