# SPDX-License-Identifier: Apache-2.0
"""Run cache-dit's own tests of its caching, unmodified, on fastcache.

    python bench/cache_dit_tests.py CHECKOUT [--kernels | --own] [pytest arguments]

CHECKOUT is a clone of vipshop/cache-dit; only its `tests/api` are used, the library is the installed one.
`--kernels` runs them with `accelerate()` in place of `install()`, `--own` without fastcache, for comparison. Left out
are its tests of attention backends, of the examples' command line and of quantization, which concern no cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from fastcache.integrations import cache_dit as backend

FILES = (
    "test_forward_pattern.py",
    "test_refresh_context.py",
    "test_load_configs.py",
    "test_taylorseers.py",
    "test_foca.py",
    "test_foca_config.py",
    "test_dmd_config.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--own", action="store_true")
    args, rest = parser.parse_known_args()
    tests = args.checkout.resolve() / "tests"
    if not (tests / "api" / FILES[0]).is_file():
        parser.error(f"{args.checkout} holds no tests/api of cache-dit")
    if not args.own:
        (backend.accelerate if args.kernels else backend.install)()
    os.chdir(tests)  # where they look for their files
    sys.path.insert(0, str(tests / "api"))
    # no plugins of ours, no cache folder in the checkout
    return int(pytest.main([*(f"api/{name}" for name in FILES), "-p", "no:cacheprovider", *rest]))


if __name__ == "__main__":
    raise SystemExit(main())
