# SPDX-License-Identifier: Apache-2.0
"""Who may import what and touch what, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import house
import pytest

ROOT = house.ROOT
PACKAGE, KERNELS = ROOT / "fastcache", ROOT / "triton_kernels"
files, tree = lambda folder: sorted(folder.rglob("*.py")), house.tree
KNOWN = house.modules()
CORE = [
    p for p in files(PACKAGE) if p.relative_to(PACKAGE).parts[0] not in ("integrations", "demo")
]
TREES = {path: tree(path) for path in [*files(PACKAGE), *files(KERNELS)]}

# The folders and files of the package from the ground up: each may import what stands above it here.
LAYERS = (
    ("checks", "files", "sync"),
    ("ops", "signals"),
    ("policies", "predictors", "models"),
    ("storage", "plan"),
    ("targets",),
    ("misfits", "parts", "made_for"),
    ("recipe",),
    ("configs", "runtime"),
    ("reporting", "graphs"),
    ("calibration",),
    ("cache",),
    ("tools", "integrations"),
    ("tuning",),
    ("__init__",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def place(module: str) -> str:
    """The folder or file of the package that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def resolved(path: Path, node: ast.ImportFrom) -> str:
    """The dotted name that a `from` import means."""
    if not node.level:
        return node.module or ""
    inside = path.is_relative_to(PACKAGE)
    package = (
        ["fastcache", *path.relative_to(PACKAGE).parent.parts]
        if inside
        else (["fastcache", "triton_kernels", *path.relative_to(KERNELS).parent.parts])
    )
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def imports(path: Path) -> set[str]:
    """Dotted names of all imports, those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolved(path, node)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def takes(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports(path))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def attributes(path: Path) -> Iterator[ast.Attribute]:
    return (n for n in ast.walk(TREES[path]) if isinstance(n, ast.Attribute))


def test_there_is_something_to_read():
    names = {named(p) for p in TREES}
    assert {"fastcache/ops/registry.py", "fastcache/sync.py", "fastcache/cache.py"} <= names
    assert {"fastcache/targets/stack/target.py", "fastcache/policies/base.py"} <= names
    assert len([n for n in names if n.startswith("triton_kernels/")]) >= 3
    assert {place(m) for m in KNOWN if m.startswith("fastcache")} - {"triton_kernels"} == set(RANK)


@pytest.mark.parametrize("path", files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward_only(path):
    here = place(house.name_of(path))
    for module in house.imported(path, set(KNOWN)):
        there = place(module)
        if there in (here, "triton_kernels") or not module.startswith("fastcache"):
            continue
        assert RANK[there] < RANK[here], f"{named(path)} imports {module}"


def test_kernels_import_nothing_of_fastcache():
    own = "fastcache.triton_kernels"
    for path in files(KERNELS):
        foreign = {
            n for n in imports(path) if n.startswith("fastcache") and not n.startswith(own)
        } - {"fastcache"}
        assert not foreign, f"{named(path)} imports {foreign}"


PURE = [
    *files(PACKAGE / "signals"),
    *files(PACKAGE / "policies"),
    *files(PACKAGE / "predictors"),
    PACKAGE / "checks.py",
    PACKAGE / "plan.py",
    PACKAGE / "recipe.py",
    PACKAGE / "models" / "adapter.py",
    PACKAGE / "models" / "table.py",
    PACKAGE / "targets" / "spec.py",
]


@pytest.mark.parametrize("path", PURE, ids=named)
def test_rules_and_what_is_known_of_models_import_no_torch(path):
    assert not takes(path, "torch")


def test_only_ops_touches_torch_library():
    touching = {
        named(path)
        for path in TREES
        if takes(path, "torch.library")
        or any(dotted(a).startswith("torch.library") for a in attributes(path))
    }
    assert touching == {"fastcache/ops/registry.py"}


# What reads a device value on the host. Lists and arrays have `tolist` too: those places are listed,
# each with what it is called on there.
READS = ("item", "tolist", "cpu", "numpy")
ON_HOST = {
    "fastcache/configs/mag_cache.py",  # ratios that a user gives, when a config is made
    "fastcache/calibration/fields.py",  # ratios on their way into a calibration
    "fastcache/ops/backends/cpp.py",  # kernels of the CPU: weights that lie there already
}


def test_only_sync_reads_the_device():
    for path in CORE:
        if named(path) in {"fastcache/sync.py", *ON_HOST}:
            continue
        calls = [
            f"{named(path)}:{n.lineno} .{n.func.attr}()"
            for n in ast.walk(TREES[path])
            if isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and n.func.attr in READS
            and not n.args
        ]
        assert not calls, calls
    reading = {a.attr for a in attributes(PACKAGE / "sync.py")}
    assert reading & set(READS), "sync.py no longer reads: the test looks at the wrong place"


def test_comparisons_of_tensors_go_through_sync():
    """torch.equal and torch.allclose wait for the device too."""
    for path in CORE:
        if path.name == "sync.py":
            continue
        names = {dotted(a) for a in attributes(path)}
        assert not names & {"torch.equal", "torch.allclose"}, named(path)


FORWARD = ("targets/", "runtime/patch.py", "runtime/runs.py", "graphs/compiled.py", "models/")


def test_only_targets_and_the_runtime_touch_forward():
    """models/ reads the signature of a forward; nothing else knows the name."""
    for path in CORE:
        where = str(path.relative_to(PACKAGE))
        if where.startswith(FORWARD):
            continue
        uses = [f"{named(path)}:{a.lineno}" for a in attributes(path) if a.attr == "forward"]
        uses += [
            f"{named(path)}:{n.lineno}"
            for n in ast.walk(TREES[path])
            if isinstance(n, ast.Constant) and n.value == "forward"
        ]
        assert not uses, uses
    for node in (n for p in files(PACKAGE / "models") for n in ast.walk(TREES[p])):
        targets = getattr(node, "targets", [])
        assert not any(getattr(t, "attr", "") == "forward" for t in targets), "models/ only reads"


@pytest.mark.parametrize("path", CORE, ids=named)
def test_the_core_imports_no_diffusers(path):
    assert not takes(path, "diffusers")
    assert not takes(path, "transformers")


# Methods of an engine that hides its own there, because its counters would be guarded on.
HIDDEN = {"fastcache/integrations/cache_dit/accelerate.py"}


@pytest.mark.parametrize("path", list(TREES), ids=named)
def test_nothing_is_hidden_from_the_compiler_and_no_error_is_swallowed(path):
    names = {dotted(a) for a in attributes(path)}
    hidden = {n for n in names if n.endswith(("compiler.disable", "_dynamo.disable"))}
    assert bool(hidden) == (named(path) in HIDDEN)
    assert "torch.compiler.disable" not in imports(path)
    bare = [
        n.lineno for n in ast.walk(TREES[path]) if isinstance(n, ast.ExceptHandler) and not n.type
    ]
    assert not bare, f"bare except at {bare}"
    assert not [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Global)], "global"


def test_importing_the_package_imports_no_diffusers_and_starts_no_device():
    import subprocess
    import sys

    code = (
        "import sys, fastcache, torch; "
        "assert not {'diffusers', 'transformers', 'matplotlib', 'triton'} & set(sys.modules), "
        "sorted({'diffusers', 'transformers', 'matplotlib', 'triton'} & set(sys.modules)); "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
