"""The CUDA C++ kernels: the functions of `reference.py`, under the same names.

Built only where nvcc and a CUDA build of torch are present. None of it has run on a GPU yet.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).parent / "_cuda_ops.so"


@cache
def available() -> bool | str:
    """True, or the reason why these kernels cannot run."""
    return "extension not built: reinstall with nvcc, a CUDA torch and FASTCACHE_BUILD_CUDA=1"
