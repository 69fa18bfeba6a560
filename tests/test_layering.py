"""Who may import what: the rules of docs/architecture.md, read off the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "fastcache", ROOT / "triton_kernels"

pytestmark = pytest.mark.skipif(not KERNELS.is_dir(), reason="needs the source tree")

# pure Python on host numbers, or only strings
WITHOUT_TORCH = (
    "policies",
    "adapters.py",
    "predictors.py",
    "recipe.py",
    "report.py",
    "stats.py",
    "targets/spec.py",
    "cli.py",
)
# what brings a value from the device to the host
READS = {"item", "tolist", "cpu", "numpy", "equal", "allclose", "synchronize"}
# these read tensors that a user or a file gave as settings, or that live on the host by contract
READERS = {"signal.py", "configs.py", "calibrate.py", "native.py"}


def sources(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a module; relative ones begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (f"{base}{alias.name}" for alias in node.names)


def at_top(tree: ast.Module) -> Iterator[str]:
    """Imports that run when the module is imported."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(ast.Module([node], []))


def test_triton_kernels_import_nothing_of_fastcache():
    for name, tree in sources(KERNELS):
        for module in imported(tree):
            assert not module.startswith(("fastcache", "..")), f"{name} imports {module}"


def test_policies_and_tables_import_no_torch():
    for name, tree in sources(PACKAGE):
        if not name.startswith(WITHOUT_TORCH):
            continue
        for module in at_top(tree):
            assert module.split(".")[0] != "torch", f"{name} imports {module}"


def test_only_ops_touches_torch_library():
    for name, tree in sources(PACKAGE):
        if name == "ops.py":
            continue
        for module in imported(tree):
            assert not module.startswith("torch.library"), f"{name} imports {module}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "library":
                assert ast.unparse(node) != "torch.library", f"{name}:{node.lineno}"


def test_only_signal_reads_the_device():
    for name, tree in sources(PACKAGE):
        if name in READERS or name.startswith("demo/"):
            continue
        for node in ast.walk(tree):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if called and node.func.attr in READS:
                pytest.fail(f"{name}:{node.lineno} calls {ast.unparse(node.func)}")


def test_diffusers_is_imported_by_demo_and_integrations_only():
    for name, tree in sources(PACKAGE):
        if name.startswith(("demo/", "integrations/")):
            continue
        for module in imported(tree):
            assert module.split(".")[0] != "diffusers", f"{name} imports {module}"


def test_only_targets_and_runtime_replace_forward():
    for name, tree in sources(PACKAGE):
        if name.startswith(("targets/", "runtime.py", "integrations/")):
            continue
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                text = ast.unparse(target)
                assert not text.endswith((".forward", "['forward']")), f"{name}:{node.lineno}"


def test_drawing_libraries_are_imported_when_used():
    for name, tree in sources(PACKAGE):
        for module in at_top(tree):
            assert module.split(".")[0] not in ("matplotlib", "tqdm", "rich"), name
