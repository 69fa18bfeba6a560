# SPDX-License-Identifier: Apache-2.0
"""The structure of the tree, read from its source without running it.

    python tests/house.py            # print the figures; exit 1 where one is above its limit
    python tests/house.py --write    # first write the licence into source files that lack it

What it counts is in `FIGURES`; `tests/tools/test_layering.py` holds the layers, this file the arithmetic.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 320  # lines of a file, but for its licence

# The licence as the first line of a source file, or the second where the first one names an interpreter.
LICENCE = "SPDX-License-Identifier: Apache-2.0"
MARKS = {
    ".py": "# ", ".sh": "# ", ".c": "// ", ".cpp": "// ", ".h": "// ", ".inc": "// ", ".cu": "// ", ".cuh": "// ",
}  # fmt: skip
SOURCES = ("fastcache", "triton_kernels", "csrc", "bench", "docs", "tests", "examples")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    """The dotted module name of a file."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "triton_kernels":
        parts.insert(0, "fastcache")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module of the package, its kernels and its benchmarks, by name."""
    return {name_of(p): p for p in python_files("fastcache", "triton_kernels", "bench")}


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, also inside functions and for types alone."""
    here = name_of(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                found |= {f"{base}.{alias.name}"} & known or {base} & known
    return found - {name_of(path)}


def circles() -> list[list[str]]:
    """Groups of modules that import each other, by whatever way (Tarjan's components)."""
    known = modules()
    graph = {name: imported(path, set(known)) for name, path in known.items()}
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in graph[name]:
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in number:
            visit(name)
    return found


def lines_of(path: Path) -> int:
    return sum(LICENCE not in line for line in path.read_text().splitlines())


def long_files() -> list[str]:
    counted = ((p, lines_of(p)) for p in modules().values())
    return [f"{p.relative_to(ROOT)} {lines}" for p, lines in counted if lines > LONGEST]


def own_classes() -> set[str]:
    """Names of the classes that the package defines."""
    return {
        node.name
        for path in python_files("fastcache")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    }


def places(path: Path, nodes: Iterator[ast.AST]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{node.lineno}" for node in nodes]  # type: ignore[attr-defined]


def private_uses() -> list[str]:
    """Reads and writes of `x._name` where no class or module of the same file defines `_name`."""
    found: list[str] = []
    for path in python_files("fastcache"):
        nodes = list(ast.walk(tree(path)))
        own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {
            n.attr
            for n in nodes
            if isinstance(n, ast.Attribute)
            and isinstance(n.value, ast.Name)
            and n.value.id in ("self", "cls")
        }
        own |= {
            n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }  # slots and attribute names kept as strings
        foreign = (
            n
            for n in nodes
            if isinstance(n, ast.Attribute)
            and n.attr.startswith("_")
            and not n.attr.startswith("__")
            and n.attr not in own
            and n.attr not in OF_OTHERS
        )
        found += places(path, foreign)
    return found


# Names of torch, diffusers and Python that only look private: they publish no other.
OF_OTHERS = {
    "_C", "_backward_hooks", "_base", "_cache_config", "_cdata", "_check", "_compiled_call_impl", "_dynamo",
    "_fn_refs", "_foreach_copy_", "_forward_hooks", "_getframe", "_hook_order", "_inductor",
    "_len_torch_dispatch_stack", "_module_ref", "_modules", "_orig_mod", "_replace",
    "_reset_stateful_cache", "_version",
}  # fmt: skip


def own_isinstance() -> list[str]:
    """isinstance tests of the package's own classes."""
    kinds = own_classes()
    found: list[str] = []
    for path in python_files("fastcache"):
        found += places(
            path,
            (
                n
                for n in ast.walk(tree(path))
                if isinstance(n, ast.Call)
                and isinstance(n.func, ast.Name)
                and n.func.id == "isinstance"
                and {x.id for x in ast.walk(n.args[1]) if isinstance(x, ast.Name)} & kinds
            ),
        )
    return found


def own_getattr() -> list[str]:
    """getattr(x, "name", default) where the package's own classes have that attribute."""
    own = {
        target.attr
        for path in python_files("fastcache")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self"
    }
    found: list[str] = []
    for path in python_files("fastcache"):
        found += places(
            path,
            (
                n
                for n in ast.walk(tree(path))
                if isinstance(n, ast.Call)
                and isinstance(n.func, ast.Name)
                and n.func.id == "getattr"
                and len(n.args) == 3
                and isinstance(n.args[1], ast.Constant)
                and n.args[1].value in own
            ),
        )
    return found


# Parts that hold state, and names of dicts there that are a caller's own.
STATEFUL = ("storage", "targets", "runtime", "graphs")
OF_CALLERS = {"__dict__", "attributes", "cache", "fields", "given", "kwargs", "options", "output"}


def string_keys() -> list[str]:
    """Reads and writes of `x["name"]` in what holds state: what has a name there is an attribute."""
    found: list[str] = []
    for path in python_files(*(f"fastcache/{part}" for part in STATEFUL)):
        keyed = (
            n
            for n in ast.walk(tree(path))
            if isinstance(n, ast.Subscript)
            and isinstance(n.slice, ast.Constant)
            and isinstance(n.slice.value, str)
            and getattr(n.value, "id", getattr(n.value, "attr", "")) not in OF_CALLERS
        )
        found += places(path, keyed)
    return found


def unlicensed() -> list[Path]:
    """Source files that do not begin with their licence."""
    found = (p for folder in SOURCES for p in (ROOT / folder).rglob("*") if p.suffix in MARKS)
    sources = [ROOT / "setup.py", *sorted(found)]
    return [p for p in sources if LICENCE not in "".join(p.read_text().splitlines(True)[:2])]


def license_files() -> None:
    for path in unlicensed():
        first, *rest = path.read_text().splitlines(True) or [""]
        line = f"{MARKS[path.suffix]}{LICENCE}\n"
        path.write_text(
            "".join([first, line, *rest] if first[:2] == "#!" else [line, first, *rest])
        )


# What is counted, and how many there may be.
FIGURES = {
    "import circles": (circles, 0),
    f"files over {LONGEST} lines": (long_files, 0),
    "private attributes used across modules": (private_uses, 0),
    "isinstance on our own kinds": (own_isinstance, 5),
    'getattr(own, "name", default)': (own_getattr, 0),
    "string-keyed slots": (string_keys, 0),
    "files without their licence": (unlicensed, 0),
}


def main(options: list[str]) -> int:
    if options == ["--write"]:
        license_files()
    bad = 0
    for name, (count, most) in FIGURES.items():
        found = count()
        print(f"{name}: {len(found)} (at most {most})")
        if len(found) > most:
            bad += 1
            print(*(f"    {place}" for place in found), sep="\n")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
