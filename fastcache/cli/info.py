# SPDX-License-Identifier: Apache-2.0
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
from ..ops.backends import cpp, cuda

DISTRIBUTION = "fastcache-dit"
LIBRARIES = {"C++ kernels": cpp.LIBRARY, "CUDA C++ kernels": cuda.LIBRARY}
PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _wheel() -> str:
    """What was installed: the tags of its wheel, which say where it may be."""
    for found in importlib.metadata.distributions(name=DISTRIBUTION):
        if lines := (
            found.read_text("WHEEL") or ""
        ).splitlines():  # a checkout that was built has none
            break
    else:
        return "not installed, imported from a folder"
    tags = [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]
    editable = ", editable" * ('"editable": true' in (found.read_text("direct_url.json") or ""))
    return f"{DISTRIBUTION} {found.version}, {' '.join(tags)}{editable}"


def _held() -> str:
    """The native libraries that came with it."""
    held = [f"{name} ({path.name})" for name, path in LIBRARIES.items() if path.exists()]
    lacking = [f"no {name}" for name, path in LIBRARIES.items() if not path.exists()]
    return ", ".join([*held, *lacking])


def _rows() -> Iterator[tuple[str, str]]:
    yield "fastcache", __version__
    yield "wheel", _wheel()
    yield "holds", _held()
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
