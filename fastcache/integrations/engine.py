# SPDX-License-Identifier: Apache-2.0
"""What every integration does with its engine: find it, ask its version, put something in its place, give it back."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

ABSENT: Any = object()


def engine(module: str, package: str, versions: tuple[str, ...]) -> Any:
    """A module of an engine, imported now.

    Args:
        module: its dotted name.
        package: the distribution that it comes from, as pip knows it.
        versions: beginnings of the versions whose interface is known, such as "1.5."; "" takes any.
    Returns:
        The module.
    Raises:
        ImportError: the engine is missing, or of another version; it says which and what to install.
    """
    known = " or ".join(f"{v}*" for v in versions)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name or "\0"):
            raise  # the engine is there, and lacks something of its own
        raise ImportError(
            f"{package} is not installed: `{module}` cannot be imported here; install {package} {known}"
        ) from error
    version = version_of(package, found)
    if not version.startswith(versions):
        raise ImportError(
            f"{package} is {version}, and this integration knows {known}: install one of these"
        )
    return found


def version_of(package: str, module: Any) -> str:
    """The version of an engine: that of the installed distribution, else what its module says of itself."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(vars(module).get("__version__", "unknown"))


class Swaps:
    """Attributes of an engine that were replaced, in order, with what they were."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self.kept)

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute of a class, a module or an object itself.

        Args:
            owner: whose attribute it is.
            name: of the attribute.
            value: what takes its place.
        """
        self.kept.append((owner, name, vars(owner).get(name, ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Give everything back, the newest first."""
        while self.kept:
            owner, name, value = self.kept.pop()
            if value is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
