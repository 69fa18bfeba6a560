# SPDX-License-Identifier: Apache-2.0
"""Packages, and the optional native libraries; everything else is in pyproject.toml.

FASTCACHE_BUILD_CPU and FASTCACHE_BUILD_CUDA are `auto` (build where possible), `0` (never) or `1`
(an error where impossible). Without a library the package works on its Python kernels.

The libraries register operators through torch's stable ABI and use no Python API: one wheel serves
every Python and every torch from 2.10 on.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX = shlex.split(os.environ.get("CXX", "c++"))
MAC = sys.platform == "darwin"
BUILDING = not {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"}.isdisjoint(
    sys.argv
)

# no contraction: a * b + c keeps its two roundings, so that every ISA gives the bits of eager torch
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
CXX_FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi", f"-fmacro-prefix-map={ROOT}/="]
# the same promise on a GPU; TORCH_CUDA_ARCH_LIST overrides the architectures
CUDA_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "-Xcompiler=-fPIC"]
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10


class Unavailable(Exception):
    """Why a library cannot be built here, and what to do."""


class Ninja:
    """A build.ninja under construction; objects are compiled once and shared between libraries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.edges: dict[str, list[str]] = {}

    def edge(self, rule: str, out: str, inputs: list[str], compiler: list[str], flags: list[str]):
        def path(p: str) -> str:
            return p.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def words(w: list[str]) -> str:
            return shlex.join(w).replace("$", "$$")

        self.edges[out] = [
            f"build {path(out)}: {rule} {' '.join(map(path, inputs))}",
            f"  compiler = {words(compiler)}",
            f"  flags = {words(flags)}",
        ]
        return out

    def compile(self, source: str, compiler: list[str], flags: list[str]) -> str:
        return self.edge(
            "compile", source.replace("/", "_") + ".o", [str(ROOT / source)], compiler, flags
        )

    def link(self, out: str, objects: list[str], flags: list[str]) -> None:
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if MAC else ["-shared", "-Wl,-s"]
        self.edge("link", out, objects, CXX, [*shared, *flags])

    def run(self, out: str) -> None:
        rules = [
            "rule compile",
            "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler $in -o $out $flags",
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join([*rules, *(line for edge in self.edges.values() for line in edge), ""])
        (self.folder / "build.ninja").write_text(text)
        subprocess.run([find_ninja(), "-C", str(self.folder), out], check=True)


def find_ninja() -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which("ninja", path=path)
    if found is None:
        raise Unavailable("ninja is missing: pip install ninja")
    return found


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("this build environment has no torch: pip install --no-build-isolation .")
    return Path(spec.origin).parent


def torch_flags() -> tuple[list[str], list[str]]:
    torch = torch_folder()
    include, lib = torch / "include", torch / "lib"
    # nothing refers to libtorch by name, yet it must be found when the library is loaded
    link = [] if MAC else [f"-L{lib}", "-Wl,--no-as-needed", "-ltorch"]
    return ["-isystem", str(include), *STABLE_ABI], link


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def cuda_architectures() -> list[str]:
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    flags = []
    for entry in wish.replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * entry.endswith("+PTX")
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def give_up(names: list[str], reason: object) -> None:
    print(f"fastcache: continuing without {', '.join(names)}: {reason}", file=sys.stderr)


class Library(Extension):
    """A shared object: `check` says whether it can be built, `add_to` adds its edges."""

    suffix = ".so"

    def __init__(self, name: str, switch: str, folder: str) -> None:
        sources = sorted(f"{folder}/{p.name}" for p in (ROOT / folder).glob("*.c*"))
        super().__init__(name, sources, optional=True)
        self.folder = folder
        self.wish = os.environ.get(switch, "auto")
        if self.wish not in ("auto", "0", "1"):
            raise SystemExit(f"{switch} is {self.wish!r}, must be auto, 0 or 1")

    def must(self, reason: object) -> None:
        """An error if the library was asked for."""
        if self.wish == "1":
            raise SystemExit(f"fastcache: {self.name} cannot be built: {reason}")

    def check(self) -> None:
        if os.name != "posix":
            raise Unavailable("only GCC and Clang are supported")
        if shutil.which(CXX[0]) is None:
            raise Unavailable(f"no C++ compiler ({CXX[0]}): install one or set CXX")
        torch_folder()
        find_ninja()

    def add_to(self, ninja: Ninja, out: str) -> None:
        raise NotImplementedError

    def binding(self, ninja: Ninja, source: str, flags: list[str]) -> str:
        return ninja.compile(f"{self.folder}/{source}", CXX, [*CXX_FLAGS, *flags])


class CpuOps(Library):
    def __init__(self, name: str = "fastcache._cpu_ops") -> None:
        super().__init__(name, "FASTCACHE_BUILD_CPU", "csrc/cpu")

    def kernels(self, ninja: Ninja) -> list[str]:
        return [ninja.compile(s, CXX, CXX_FLAGS) for s in self.sources if "/kernels" in s]

    def add_to(self, ninja: Ninja, out: str) -> None:
        flags, link = torch_flags()
        ninja.link(out, [*self.kernels(ninja), self.binding(ninja, "ops.cpp", flags)], link)


class WhiteBox(CpuOps):
    """The C++ internals for the tests: development only, hence editable installs only."""

    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"

    def __init__(self) -> None:
        super().__init__("fastcache._native_test")

    def check(self) -> None:
        super().check()
        if importlib.util.find_spec("pybind11") is None:
            raise Unavailable("pybind11 is missing: pip install pybind11")

    def add_to(self, ninja: Ninja, out: str) -> None:
        import pybind11

        folders = (pybind11.get_include(), sysconfig.get_paths()["include"])
        flags = [flag for folder in folders for flag in ("-isystem", folder)]
        ninja.link(out, [*self.kernels(ninja), self.binding(ninja, "white_box.cpp", flags)], [])


class CudaOps(Library):
    def __init__(self) -> None:
        super().__init__("fastcache._cuda_ops", "FASTCACHE_BUILD_CUDA", "csrc/cuda")

    def check(self) -> None:
        super().check()
        if find_nvcc() is None:
            raise Unavailable("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
        # importing torch takes seconds
        version = runpy.run_path(str(torch_folder() / "version.py"))
        if version["cuda"] is None:
            raise Unavailable(f"torch {version['__version__']} is not a CUDA build")

    def add_to(self, ninja: Ninja, out: str) -> None:
        nvcc = [find_nvcc() or "nvcc"]
        flags = [*CUDA_FLAGS, *cuda_architectures()]
        kernels = [ninja.compile(s, nvcc, flags) for s in self.sources if s.endswith(".cu")]
        include, link = torch_flags()
        ops = self.binding(ninja, "ops.cpp", ["-DUSE_CUDA", *include])
        link = [f"-Xlinker={f.removeprefix('-Wl,')}" if f.startswith("-Wl,") else f for f in link]
        ninja.edge("link", out, [*kernels, ops], nvcc, ["-shared", *link, "-ltorch_cuda"])


class NativeBuild(build_ext):
    def build_extensions(self) -> None:
        ninja = Ninja(ROOT / "build" / "native")  # kept, so that a second build is incremental
        for library in self.extensions:
            out = Path(self.get_ext_fullpath(library.name)).resolve()
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                library.add_to(ninja, str(out))
                ninja.run(str(out))
            except (Unavailable, subprocess.CalledProcessError) as error:
                library.must(error)
                give_up([library.name], error)

    def get_ext_filename(self, fullname: str) -> str:
        suffix = next(e.suffix for e in self.extensions if e.name.endswith(fullname))
        return os.path.join(*fullname.split(".")) + suffix


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        return (python, abi, system) if self.root_is_pure else ("py3", "none", system)


def libraries() -> list[Library]:
    """What can be built here; the rest has said why not."""
    wanted: list[Library] = [CpuOps(), CudaOps()] if BUILDING else []
    if "editable_wheel" in sys.argv:
        wanted.append(WhiteBox())
    possible: list[Library] = []
    skipped: dict[str, list[str]] = {}
    for library in (w for w in wanted if w.wish != "0"):
        try:
            library.check()
            possible.append(library)
        except Unavailable as reason:
            library.must(reason)
            skipped.setdefault(str(reason), []).append(library.name)
    for reason, names in skipped.items():  # one line for what one cause took away
        give_up(names, reason)
    return possible


setup(
    packages=[
        "fastcache",
        *(f"fastcache.{p}" for p in find_packages("fastcache")),
        # a top-level folder here, so that the kernels stand alone; in the package once installed
        "fastcache.triton_kernels",
        *(f"fastcache.triton_kernels.{p}" for p in find_packages("triton_kernels")),
    ],
    package_dir={"fastcache": "fastcache", "fastcache.triton_kernels": "triton_kernels"},
    package_data={"": ["py.typed", "*.json"], "fastcache.demo": ["assets/*"]},
    include_package_data=False,
    ext_modules=libraries(),
    cmdclass={"build_ext": NativeBuild, "bdist_wheel": PlatformWheel},
)
