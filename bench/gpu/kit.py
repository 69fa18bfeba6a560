# SPDX-License-Identifier: Apache-2.0
"""What travels to a GPU without a network: built libraries, compiled kernels, wheels, a manifest.

    python -m bench.gpu.kit make FOLDER                  `make gpu-kit`, in an environment like the target's
    python -m bench.gpu.kit unpack FOLDER REPO ROOM      there: sources and kit, laid out to run in ROOM

A library is for any Python and torch (the stable ABI), but for one state of csrc/. A Triton cache is
for one Triton, one minor version of Python and one state of triton_kernels/; where they differ it is
left behind, for Triton would compile all the same. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"  # the target's; its torch and triton are those of constraints-cuda.txt
ARCHITECTURE = "9.0"
WHEELS = ("diffusers", "cache-dit", "importlib-metadata")  # pure Python that the target lacks
MOST_FILES, MOST_BYTES = 8, 16 * 2**20
LIBRARIES, KERNELS, MANIFEST = "libraries.tar.xz", "triton-cache.tar.xz", "manifest.json"
BUILT = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "dist", "*.egg-info")
Manifest = dict[str, Any]


# --- versions -------------------------------------------------------------------------------------------


def versions() -> Manifest:
    """What must be the same here and there."""

    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    minor = ".".join(platform.python_version_tuple()[:2])
    return {"python": minor, "torch": installed("torch"), "triton": installed("triton")}


def pinned(file: str) -> dict[str, str]:
    """Versions by package, of a file of constraints."""
    lines = (
        line.split("#")[0].split(";")[0].strip() for line in (ROOT / file).read_text().split("\n")
    )
    return dict(line.split("==") for line in lines if "==" in line)


def digest(folder: Path) -> str:
    """One state of a folder of sources."""
    found = hashlib.sha256()
    for path in sorted(
        p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".inc")
    ):
        found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


# --- the two ways ---------------------------------------------------------------------------------------


def lay_out(repo: Path, room: Path) -> tuple[Path, Path]:
    """(site, work): the package as an installation would have it, and tests and benchmarks beside it."""
    site, work = room / "site", room / "work"
    keep = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repo / "fastcache", site / "fastcache", ignore=keep)
    shutil.copytree(repo / "triton_kernels", site / "fastcache" / "triton_kernels", ignore=keep)
    for folder in ("bench", "tests", "csrc"):
        shutil.copytree(repo / folder, work / folder, ignore=keep)
    return site, work


def make(folder: Path) -> Manifest:
    """Build the kit. Raises SystemExit where it would be of no use there."""
    have, pins = versions(), pinned("constraints-cuda.txt")
    want = {"python": PYTHON, "torch": pins["torch"], "triton": pins["triton"]}
    if {k: str(v).split("+")[0] for k, v in have.items()} != want:
        raise SystemExit(f"the kit is for {want}, but this is {have}: see `make gpu-kit`")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch)
        libraries = build(room / "build")
        pack(folder / LIBRARIES, libraries, list(libraries.rglob("*.so")))
        site, work = lay_out(ROOT, room / "room")
        cache, moved = room / "made" / "cache", room / "moved" / "cache"
        compile_kernels(site, work, cache)
        pack(folder / KERNELS, cache, files(cache))
        spread(folder / KERNELS, moved)
        rebase(moved)
        compile_kernels(site, work, moved)  # which must find all of it at another place
        if new := {p.relative_to(moved) for p in files(moved)} - {
            p.relative_to(cache) for p in files(cache)
        }:
            raise SystemExit(
                f"the cache does not serve where it is unpacked: {len(new)} files are new"
            )
        kernels = len(list(cache.rglob("*.cubin")))
    pins = pinned("constraints.txt") | pins
    fetch = ["download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    pip(*fetch, *(f"{name}=={pins[name]}" for name in WHEELS))
    manifest = {"commit": commit(), **have, "architecture": ARCHITECTURE, "kernels": kernels}
    manifest |= {name: digest(ROOT / name) for name in ("csrc", "triton_kernels")}
    manifest["files"] = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    check(folder)
    return manifest


def check(folder: Path) -> None:
    """Raise SystemExit unless the kit is small enough to travel."""
    sizes = [p.stat().st_size for p in folder.iterdir()]
    if len(sizes) > MOST_FILES or sum(sizes) > MOST_BYTES:
        raise SystemExit(
            f"the kit has {len(sizes)} files of {sum(sizes)} bytes, may have {MOST_FILES} and {MOST_BYTES}"
        )


def unpack(folder: Path, repo: Path, room: Path) -> Manifest:
    """Lay out the sources and what of the kit fits them; says what was used and why the rest was not."""
    site, _ = lay_out(repo, room)
    cache = room / "triton"
    cache.mkdir()
    if not (folder / MANIFEST).exists():
        return {"kit": None, "libraries": "no kit", "triton_cache": "no kit", "wheels": []}
    manifest = json.loads((folder / MANIFEST).read_text())
    said: Manifest = {"kit": manifest["commit"], "kernels": manifest["kernels"]}
    said["libraries"] = differs(manifest, {"csrc": digest(repo / "csrc")})
    if not said["libraries"]:
        spread(folder / LIBRARIES, site)
    here = versions()
    here = {"python": here["python"], "triton": here["triton"]}
    here["triton_kernels"] = digest(repo / "triton_kernels")
    said["triton_cache"] = differs(manifest, here)
    if not said["triton_cache"]:
        spread(folder / KERNELS, cache)
        rebase(cache)
    wheels = sorted(folder.glob("*.whl"))
    pip(
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        str(site),
        *map(str, wheels),
    )
    said["wheels"] = [w.name for w in wheels]
    return {k: v or "carried" for k, v in said.items()}


def differs(manifest: Manifest, here: dict[str, Any]) -> str:
    """Why a part of the kit is of no use here, or nothing."""
    other = [f"{k} {manifest[k]} there, {v} here" for k, v in here.items() if manifest[k] != v]
    return f"left behind: {', '.join(other)}" if other else ""


# --- parts ----------------------------------------------------------------------------------------------


def build(folder: Path) -> Path:
    """Both libraries, from a copy of the sources; where they lie as in an installed package."""
    shutil.copytree(ROOT, folder / "src", ignore=BUILT)
    switches = {"FASTCACHE_BUILD_CPU": "1", "FASTCACHE_BUILD_CUDA": "1"}
    switches["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURE
    where = ["--target", str(folder / "site"), str(folder / "src")]
    pip("install", "-q", "--no-index", "--no-deps", "--no-build-isolation", *where, **switches)
    return folder / "site"


def compile_kernels(site: Path, work: Path, cache: Path) -> None:
    """Every kernel that the tests and benchmarks launch, and what launches it, without a GPU."""
    stub = cache.parent / "stub"
    stub.mkdir(parents=True)
    source, library = stub / "stub.c", stub / "libcuda.so.1"  # what launchers are linked against
    source.write_text("")
    cc = os.environ.get("CC", "cc")
    subprocess.run([cc, "-shared", "-o", library, source], check=True)
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_LIBCUDA_PATH": str(stub),
        "TRITON_STORE_BINARY_ONLY": "1",
    }
    # -O: assertions about results are void where nothing runs
    command = [sys.executable, "-O", "-m", "bench.gpu.precompile"]
    subprocess.run(command, cwd=work, env=environment, check=True)


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def rebase(cache: Path) -> None:
    """Triton's groups of files name them by absolute path."""
    for path in cache.rglob("__grp__*.json"):
        group = json.loads(path.read_text())
        names = group["child_paths"]
        group["child_paths"] = {name: str(path.parent / name) for name in names}
        path.write_text(json.dumps(group))


def pack(archive: Path, root: Path, paths: list[Path]) -> None:
    with tarfile.open(archive, "w:xz") as tar:
        for path in sorted(paths):
            tar.add(path, path.relative_to(root))


def spread(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env=os.environ | environment)


def commit() -> str:
    ask = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["make"] and len(words) == 2:
        manifest = make(Path(words[1]))
        size = sum(manifest["files"].values()) / 2**20
        print(
            f"{words[1]}: {len(manifest['files'])} files, {size:.1f} MiB, {manifest['kernels']} kernels"
        )
        return 0
    if words[:1] == ["unpack"] and len(words) == 4:
        folder, repo, room = map(Path, words[1:])
        (room / "kit.json").write_text(json.dumps(unpack(folder, repo, room)))
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
