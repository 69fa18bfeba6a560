# SPDX-License-Identifier: Apache-2.0
"""Triton's own compiler and launcher on a libcuda that owns no device: all of a launch but its run.

`environment(folder)` builds that library and says how to start a Python in which `install()` makes
Triton use it. There, CPU tensors take the place of a GPU's, kernels are compiled for sm_90, and
every launch is counted instead of run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "stub_cuda.c"
ARCH = 90


def _nvidia() -> Path | None:
    """The folder of Triton's NVIDIA backend."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "backends" / "nvidia"


def missing() -> str:
    """What a stub needs and this machine lacks; empty where nothing is."""
    if _nvidia() is None:
        return "needs triton"
    return "" if shutil.which("cc") else "needs a C compiler"


def environment(folder: Path) -> dict[str, str]:
    """Environment variables under which Triton finds the stub, built in `folder`."""
    nvidia = _nvidia()
    known = set(re.findall(r"\bcu[A-Z]\w+(?=\()", SOURCE.read_text()))
    driver = (nvidia / "driver.c").read_text() + (nvidia / "driver.py").read_text()
    others = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", driver)) - known)
    rest = folder / "rest.c"
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in others))
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{nvidia / 'include'}"]
    subprocess.run(["cc", *flags, SOURCE, rest, "-o", library], check=True)
    (folder / "libcuda.so").symlink_to(library.name)  # triton 3.5 links with -lcuda
    where = {name: str(folder) for name in ("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH")}
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | where | {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


class Driver:
    """What Triton asks of its driver, answered for one sm_90 whose only stream is 0."""

    def __init__(self) -> None:
        import triton.backends.nvidia.driver as nvidia

        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.device = 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def allocate_default_profile_scratch(self, *args: int) -> None:
        return None


def install() -> ctypes.CDLL:
    """Make Triton use the stub in this process; its functions `stub_*` say what was launched."""
    from triton.runtime import driver

    driver.set_active(Driver())
    library = ctypes.CDLL("libcuda.so.1")
    library.stub_launches.restype = ctypes.c_longlong
    return library
