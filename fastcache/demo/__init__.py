# SPDX-License-Identifier: Apache-2.0
"""A small trained Flux model, shipped with the package, and the demo that runs on it."""

from __future__ import annotations

from importlib.util import find_spec


def require(*modules: str) -> None:
    """Raise an ImportError that says what to install when one of `modules` is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the fastcache demo needs {', '.join(missing)}, which cannot be imported here; "
            "install the demo extra: pip install 'fastcache-dit[demo]'"
        )
