# SPDX-License-Identifier: Apache-2.0
"""What travels to a GPU without a network: it is small, and of use only where it fits."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench.gpu import kit  # noqa: E402


@pytest.fixture
def packed(tmp_path) -> Path:
    """A kit with a library, a cache of one kernel and no wheels."""
    folder, built, cache = tmp_path / "kit", tmp_path / "built", tmp_path / "cache"
    (built / "fastcache").mkdir(parents=True)
    (built / "fastcache" / "_cuda_ops.so").write_text("library")
    (cache / "KEY").mkdir(parents=True)
    (cache / "KEY" / "k.cubin").write_text("code")
    group = {"child_paths": {"k.cubin": "/elsewhere/KEY/k.cubin"}}
    (cache / "KEY" / "__grp__k.json").write_text(json.dumps(group))
    folder.mkdir()
    kit.pack(folder / kit.LIBRARIES, built, kit.files(built))
    kit.pack(folder / kit.KERNELS, cache, kit.files(cache))
    manifest = {"commit": "abc", "kernels": 1, **kit.versions()}
    manifest |= {name: kit.digest(ROOT / name) for name in ("csrc", "triton_kernels")}
    (folder / kit.MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(kit, "pip", lambda *_, **__: None)
    room = tmp_path / "room"
    room.mkdir()
    return room


def test_a_kit_is_unpacked_where_it_fits(packed, room):
    said = kit.unpack(packed, ROOT, room)
    assert (said["libraries"], said["triton_cache"], said["kit"]) == ("carried", "carried", "abc")
    assert (room / "site/fastcache/_cuda_ops.so").read_text() == "library"
    assert (room / "site/fastcache/triton_kernels/aot.py").exists()
    assert (room / "work/bench/gpu/kit.py").exists() and (room / "work/csrc/cuda").is_dir()
    group = json.loads((room / "triton/KEY/__grp__k.json").read_text())
    assert group["child_paths"] == {"k.cubin": str(room / "triton/KEY/k.cubin")}


@pytest.mark.parametrize("other", ["triton", "python", "triton_kernels", "csrc"])
def test_what_was_made_for_something_else_is_left_behind(packed, room, other):
    manifest = json.loads((packed / kit.MANIFEST).read_text()) | {other: "another"}
    (packed / kit.MANIFEST).write_text(json.dumps(manifest))
    said = kit.unpack(packed, ROOT, room)
    part, kept = ("libraries", "triton_cache") if other == "csrc" else ("triton_cache", "libraries")
    assert said[part].startswith(f"left behind: {other} another there") and said[kept] == "carried"
    assert any((room / "triton").iterdir()) == (part == "libraries")


def test_without_a_kit_the_sources_are_laid_out(tmp_path, room):
    said = kit.unpack(tmp_path / "none", ROOT, room)
    assert said["kit"] is None and (room / "site/fastcache/ops/registry.py").exists()


def test_a_kit_made_with_other_versions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        kit, "versions", lambda: {"python": "3.12", "torch": "2.11.0", "triton": "9.9"}
    )
    with pytest.raises(SystemExit, match=re.escape("9.9")):
        kit.make(tmp_path / "kit")


@pytest.mark.parametrize(("count", "size"), [(9, 10), (2, 9 * 2**20)])
def test_a_kit_that_is_too_large_is_refused(tmp_path, count, size):
    for i in range(count):
        (tmp_path / f"{i}.whl").write_bytes(bytes(size))
    with pytest.raises(SystemExit, match=str(count * size)):
        kit.check(tmp_path)


def test_every_wheel_of_the_kit_has_a_pinned_version():
    pins = kit.pinned("constraints.txt") | kit.pinned("constraints-cuda.txt")
    assert set(kit.WHEELS) | {"torch", "triton"} <= set(pins)
    assert kit.MOST_FILES <= 8 and kit.MOST_BYTES <= 16 * 2**20


@pytest.mark.skipif(not (ROOT / ".gpu-kit").is_dir(), reason="run `make gpu-kit` first")
def test_the_kit_that_lies_here_is_small_enough():
    kit.check(ROOT / ".gpu-kit")
