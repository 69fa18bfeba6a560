# SPDX-License-Identifier: Apache-2.0
"""Pages of the site that are no files under docs/: the first, the reference, the project's own; a hook of MkDocs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastcache"

# Pages of the reference: file, title, what it is about, and where the package's names come from that stand on it.
GROUPS = (
    ("running", "Running", "Attaching a cache, driving it, and seeing what it did.",
     ("cache", "runtime", "reporting", "graphs", "tools.batching", "tools.inspect")),
    ("configs", "Configs", "The methods by name, with their documented fields and defaults.", ("configs",)),
    ("recipes", "Recipes", "When, what and where together; presets, files, plans.",
     ("recipe", "plan", "parts", "configs.presets")),
    ("policies", "Policies: when", "What decides, step by step.", ("policies",)),
    ("predictors", "Predictors: what", "What stands in for the skipped value.", ("predictors",)),
    ("targets", "Targets: where", "What is skipped.", ("targets",)),
    ("models", "Models", "Models that fastcache does not know.", ("models",)),
    ("measuring", "Measuring", "Calibrating, and finding the best recipe.", ("calibration", "tuning", "tools.measure")),
    ("ops", "Kernels", "The ops, and which backend runs them.", ("ops",)),
)  # fmt: skip
INHERITING = ("Cache",)  # names whose methods are partly those of a base that is not public

# The project's own files as pages.
COPIED = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}


def exported(folder: Path) -> list[str]:
    """`__all__` of a package, read from its source."""
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{folder} has no __all__")


def origins() -> dict[str, str]:
    """The module that each public name of the package is imported from."""
    found: dict[str, str] = {}
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = node.module or alias.name
    return {name: found[name] for name in exported(PACKAGE)}


def group_of(module: str) -> str:
    """The page of what comes from a module: that which names the longest part of its path."""
    fits = [
        (len(prefix), page)
        for page, _, _, prefixes in GROUPS
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    if not fits:
        raise ValueError(f"no page of the reference has {module}: add it to GROUPS in {__file__}")
    return max(fits)[1]


def names_on(page: str) -> list[str]:
    """Dotted public names of one page."""
    names = [f"fastcache.{n}" for n, m in origins().items() if group_of(m) == page and n != "ops"]
    if page == "ops":
        names += [f"fastcache.ops.{name}" for name in exported(PACKAGE / "ops")]
    return names


def reference() -> Iterator[tuple[str, str]]:
    """The pages of the reference, each as path and text."""
    rows = []
    for page, title, about, _ in GROUPS:
        names = names_on(page)
        links = ", ".join(f"[`{n.removeprefix('fastcache.')}`]({page}.md#{n})" for n in names)
        rows.append(f"## [{title}]({page}.md)\n\n{about}\n\n{links}\n")
        text = f"# {title}\n\n{about}\n"
        for name in names:
            inherits = name.removeprefix("fastcache.") in INHERITING
            options = "    options:\n      inherited_members: true\n" * inherits
            text += f"\n::: {name}\n{options}"
        yield f"reference/{page}.md", text
    head = "# Reference\n\nEvery public name of `import fastcache`, from the docstrings.\n\n"
    yield "reference/index.md", head + "\n".join(rows)


def copied(name: str) -> str:
    """A file of the root as a page: its links lead where they did, those to files that are no pages become words."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\]\(docs/", "](", text)
    pages = {source: page for page, source in COPIED.items()}

    def led(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if target in pages:
            return f"[{words}]({pages[target]})"
        known = target.startswith(("http", "#")) or (ROOT / "docs" / target.split("#")[0]).exists()
        return match[0] if known else words

    return re.sub(r"(?<!!)\[([^]]+)\]\(([^)\s]+)\)", led, text)


def generated() -> dict[str, str]:
    """Every page that is made here, by its path."""
    return {**{page: copied(source) for page, source in COPIED.items()}, **dict(reference())}


def decisions() -> list[str]:
    return sorted(f"decisions/{p.name}" for p in (ROOT / "docs" / "decisions").glob("*.md"))


def _fill(nav: list[Any], title: str, pages: list[Any]) -> None:
    for entry in nav:
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if key == title:
                value[:] = pages
            elif isinstance(value, list):
                _fill(value, title, pages)


# --- what MkDocs calls ----------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    _fill(
        config.nav, "Reference", ["reference/index.md", *(f"reference/{p}.md" for p, *_ in GROUPS)]
    )
    _fill(config.nav, "Decisions", decisions())
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files
