# SPDX-License-Identifier: Apache-2.0
"""The file that lets a tuning go on where it was interrupted: one JSON object per line, each a thing measured."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..files import MAX_BYTES, FileError, FileKind

FORMAT, VERSION = "fastcache-tuning-journal", 1
FILE = FileKind("journal", "fastcache.tune(journal=path)", depth=12)


class Journal:
    """What was measured, by key, in order; on disk too where there is a path.

    Args:
        path: of the file; None keeps nothing.
        settings: what the measurements depend on; a file with others is refused.
    Raises:
        ValueError: the file is no journal, or one of another tuning; the message names what differs.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self._waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.spent = 0.0  # seconds of earlier sittings
        if path is None:
            return
        if path.exists() and (not path.is_file() or b"\n" in path.read_bytes()[: MAX_BYTES + 1]):
            self._read(path)
        else:
            header = {"format": FORMAT, "version": VERSION, "settings": settings}
            path.write_text(json.dumps(header) + "\n", "utf-8")

    def _read(self, path: Path) -> None:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise FileError(
                f"journal {path}: must be a regular file of at most {MAX_BYTES >> 20} MiB"
            )
        data = path.read_bytes()
        # a line without an end was being written when the tuning was interrupted
        whole, _, torn = data.rpartition(b"\n")
        lines = whole.split(b"\n")
        header = FILE.parse(lines[0], "format", "version", "settings", place=f"journal {path}")
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise FileError(f"journal {path}: is none of this fastcache; give another path")
        before = header["settings"]
        wanted = json.loads(json.dumps(self.settings))
        if before != wanted:
            known = before if isinstance(before, dict) else {}
            differing = [k for k in wanted if known.get(k) != wanted[k]] or ["settings"]
            raise FileError(
                f"journal {path}: is of a tuning with another {differing[0]}; remove it, or give another path"
            )
        for line in lines[1:]:
            entry = FILE.parse(line, "key", "value", "at", place=f"journal {path}")
            value, at = entry["value"], entry["at"]
            if (
                not isinstance(entry["key"], str)
                or not isinstance(value, dict)
                or not isinstance(at, int | float)
            ):
                raise FileError(f"journal {path}: holds a line that is no entry; remove it")
            self._waiting[entry["key"]].append(value)
            self.spent = float(at)
        if torn:
            path.write_bytes(whole + b"\n")

    def take(self, key: str) -> dict[str, Any] | None:
        """The next thing measured under a key in an earlier sitting; None where there is none left."""
        found = self._waiting.get(key)
        return found.pop(0) if found else None

    def add(self, key: str, value: dict[str, Any], at: float) -> None:
        """Note what was measured, `at` so many seconds of the tuning."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value, "at": at}) + "\n")
