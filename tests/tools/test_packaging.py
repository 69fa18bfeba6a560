# SPDX-License-Identifier: Apache-2.0
"""The package as users get it: contents of sdist and wheel, behaviour of the build switches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import clean_environments
import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "fastcache/_cpu_ops.so"

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or shutil.which("c++") is None, reason="needs the source tree"
)


def build(what: str, source: Path, out: Path, **env: str) -> tuple[Path | None, str]:
    """A PEP 517 build in its own process: the file it made, None on failure, and what it said."""
    out.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-c",
        f"from setuptools import build_meta as b; b.{what}({str(out)!r})",
    ]
    switches = {"FASTCACHE_BUILD_CPU": "0", "FASTCACHE_BUILD_CUDA": "0"}
    run = subprocess.run(
        command, cwd=source, env=os.environ | switches | env, capture_output=True, text=True
    )
    return (next(out.iterdir()) if run.returncode == 0 else None), run.stdout + run.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution of a copy of this tree."""
    work = tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(
        ".*", "build", "dist", "site", "*.egg-info", "__pycache__", "*.so", "tests"
    )
    shutil.copytree(ROOT, work / "tree", ignore=unwanted)
    archive, said = build("build_sdist", work / "tree", work / "dist")
    assert archive is not None, said
    with tarfile.open(archive) as tar:
        tar.extractall(work / "unpacked", filter="data")
    return next((work / "unpacked").iterdir())


def test_the_sdist_holds_everything_a_build_needs(sdist):
    def files(root):
        wanted = [
            *root.glob("csrc/**/[!.]*.*"),
            *root.glob("triton_kernels/**/*.py"),
            root / "setup.py",
        ]
        return {p.relative_to(root) for p in wanted if "__pycache__" not in p.parts}

    assert files(ROOT) - files(sdist) == set()
    assert not list(sdist.rglob("*.so"))


def test_a_wheel_without_the_extension_is_pure_and_complete(sdist, tmp_path):
    wheel, said = build("build_wheel", sdist, tmp_path / "wheel")
    assert wheel is not None, said
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastcache/py.typed", "fastcache/triton_kernels/__init__.py"} <= names
    for data in (p for p in (ROOT / "fastcache").rglob("assets/*") if p.is_file()):
        assert str(data.relative_to(ROOT)) in names
    assert not [n for n in names if n.endswith(".so") or n.split("/")[0] in ("csrc", "tests")]


def test_a_wheel_with_the_extension_works_where_it_is_installed(sdist, tmp_path):
    wheel, said = build("build_wheel", sdist, tmp_path / "wheel", FASTCACHE_BUILD_CPU="1")
    assert wheel is not None, said
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [n for n in archive.namelist() if n.endswith(".so")] == [LIBRARY]
        archive.extractall(tmp_path / "site")
    symbols = ["nm", "-D", "--undefined-only", str(tmp_path / "site" / LIBRARY)]
    needed = subprocess.run(symbols, capture_output=True, text=True, check=True).stdout
    assert (
        "aoti_torch_get_data_ptr" in needed
    )  # the stable ABI, which is C; and none of C++'s, whose names are mangled
    assert not [n for n in needed.split() if n.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "Py"))]
    code = """
import fastcache.triton_kernels, torch
from fastcache.ops.backends import cpp
x = torch.ones(8)
cpp.residual_apply(x, x, x)
print(cpp.LIBRARY, x.sum().item())
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.stdout.split() == [str(tmp_path / "site" / LIBRARY), "16.0"], run.stderr


def test_only_a_wheel_for_every_python_is_checked(tmp_path):
    for name in ("f-1-py3-none-any.whl", "f-1-cp311-cp311-linux_x86_64.whl"):
        with pytest.raises(SystemExit, match="for every Python"):
            clean_environments.main([str(tmp_path / name)])


def test_without_a_compiler_the_wheel_is_pure_and_the_build_says_why(sdist, tmp_path):
    env = {
        "FASTCACHE_BUILD_CPU": "auto",
        "FASTCACHE_BUILD_CUDA": "auto",
        "CXX": "no-such-compiler",
    }
    wheel, said = build("build_wheel", sdist, tmp_path / "wheel", **env)
    assert wheel is not None and wheel.name.endswith("any.whl")
    assert said.count("continuing without") == said.count("no C++ compiler") == 1


@pytest.mark.parametrize(
    "env, message",
    [
        ({"FASTCACHE_BUILD_CPU": "1", "CXX": "no-such-compiler"}, "no C++ compiler"),
        ({"FASTCACHE_BUILD_CUDA": "1", "CUDA_HOME": "/nowhere"}, "nvcc was not found"),
        ({"FASTCACHE_BUILD_CPU": "yes"}, "must be auto, 0 or 1"),
    ],
)
def test_a_build_that_was_asked_for_and_is_impossible_fails_with_the_reason(
    sdist, tmp_path, env, message
):
    wheel, said = build("build_wheel", sdist, tmp_path / "wheel", **env)
    assert wheel is None and message in said
