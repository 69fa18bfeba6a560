# SPDX-License-Identifier: Apache-2.0
"""`python -m fastcache`: the command line."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
