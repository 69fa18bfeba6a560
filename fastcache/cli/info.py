"""What runs here and why the rest does not: `python -m fastcache info`, also `fastcache info`.

pip hides what a build printed, so the reasons are repeated at run time.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from .. import __version__
from ..ops import dispatch
from ..ops.backends import cpp

PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _rows() -> Iterator[tuple[str, str]]:
    yield "fastcache", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        yield package, _installed(package)
    yield "threads", str(torch.get_num_threads())
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i}", torch.cuda.get_device_name(i)
    for name, status in dispatch.backends().items():
        if status is not True:
            yield f"backend {name}", f"off: {status}"
        else:
            yield f"backend {name}", f"works ({cpp.capability()})" if name == "cpp" else "works"
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        yield f"ops on {device}", dispatch.active(device)


def report() -> str:
    rows = list(_rows())
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> int:
    print(report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
