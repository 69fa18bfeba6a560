# SPDX-License-Identifier: Apache-2.0
"""Reading a JSON file that nobody vouches for: its size first, then its nesting, then its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

MAX_BYTES = 4 << 20  # of a file


MAX_PARTS = 200_000  # lists, objects and strings in a file


MAX_TEXT = 1000  # characters of a name


Made = TypeVar("Made")


class FileError(ValueError):
    """A file, or what stands in one, cannot be used; the message says why and never quotes it."""


class MissingFile(FileError, FileNotFoundError):
    """There is no such file."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class FileKind:
    """A kind of JSON file, and how one that is hostile is refused.

    Args:
        role: what messages call it.
        writer: what writes one.
        depth: levels of lists and objects, a count.
        error, missing: classes of what is raised.
    """

    role: str
    writer: str
    depth: int
    error: type[ValueError] = FileError
    missing: type[ValueError] = MissingFile

    def load(self, path: Path, make: Callable[[dict[str, Any]], Made], *needed: str) -> Made:
        """What `make` makes of the JSON object in a file, which has these keys."""
        place = f"{self.role} {path}"
        values = self.parse(self._read(path), *needed, place=place)
        try:
            return make(values)
        except self.error as error:
            problem = str(error).removeprefix(f"{self.role}: ")
        raise self.error(
            f"{place}: {problem}"
        )  # outside, so that no traceback shows what the file holds

    def save(self, path: Path, values: dict[str, Any]) -> Path:
        """Write an object as a file that can be read again; returns the path."""
        text = json.dumps(values, indent=1, allow_nan=False) + "\n"
        if len(text) > MAX_BYTES:
            raise self.error(f"{self.role} {path}: would be larger than {MAX_BYTES >> 20} MiB")
        path.write_text(text, "utf-8")
        return path

    def check(self, values: Any, *needed: str) -> dict[str, Any]:
        """A JSON object that came as Python values, checked as a file is."""
        try:
            data = json.dumps(values).encode()
        except (TypeError, ValueError, RecursionError):
            data = b""
        return self.parse(data, *needed)

    def parse(self, data: bytes, *needed: str, place: str = "") -> dict[str, Any]:
        """A JSON object, its nesting limited before it is parsed, which has these keys."""
        values, problem = self._parsed(data)
        if not problem and not isinstance(values, dict):
            problem = "must hold a JSON object"
        elif not problem and (missing := [name for name in needed if name not in values]):
            problem = f"has no {missing[0]}"
        if problem:
            raise self.error(f"{place or self.role}: {problem}")
        return dict(values)

    def _read(self, path: Path) -> bytes:
        """A file's bytes, at most MAX_BYTES of them."""
        place = f"{self.role} {path}"
        try:
            if not path.exists():
                raise self.missing(f"{place}: no such file; {self.writer} writes one")
            if not path.is_file():
                raise self.error(f"{place}: must be a regular file")
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1) if path.stat().st_size <= MAX_BYTES else b""
            if len(data) <= MAX_BYTES and (data or not path.stat().st_size):
                return data
        except (OSError, ValueError) as error:
            if isinstance(error, self.error):
                raise
            raise self.error(f"{place}: cannot be read ({type(error).__name__})") from error
        raise self.error(f"{place}: is larger than {MAX_BYTES >> 20} MiB, which no {self.role} is")

    def _parsed(self, data: bytes) -> tuple[Any, str]:
        """What a JSON text means, or what is wrong with it."""
        problem = _shape(data, self.depth)
        if not problem:
            try:
                text = data.decode("utf-8")
                return json.loads(text, parse_constant=_refuse, parse_int=_short_int), ""
            except UnicodeDecodeError:
                return None, f"is not UTF-8 text; {self.role} files are JSON only"
            except json.JSONDecodeError as error:
                return None, f"is not JSON (line {error.lineno}, column {error.colno})"
            except FileError as error:
                return None, str(error)
            except (ValueError, RecursionError):
                return None, "is not JSON"
        return None, problem.format(self.role)


_MARK = re.compile(rb'["\[\]{}]')


def _shape(data: bytes, deepest: int) -> str:
    """What is wrong with the nesting of a JSON text, or ""; strings are stepped over. Linear."""
    depth = position = 0
    for _ in range(MAX_PARTS):
        mark = _MARK.search(data, position)
        if mark is None:
            return ""
        position = mark.end()
        if mark.group() == b'"':
            position = _string_end(data, position)
        else:
            depth += 1 if mark.group() in b"[{" else -1
        if depth > deepest:
            return f"is nested deeper than {deepest} levels, which no {{}} is"
    return "holds more lists and strings than any {} does"


def _string_end(data: bytes, position: int) -> int:
    """Where the string that began before `position` ends; the end of the data for an open one."""
    while (end := data.find(b'"', position)) >= 0:
        slashes = end
        while slashes > position and data[slashes - 1] == 0x5C:
            slashes -= 1
        position = end + 1
        if (end - slashes) % 2 == 0:
            return position
    return len(data)


def _refuse(name: str) -> float:
    raise FileError("holds NaN or Infinity; every number must be finite")


def _short_int(digits: str) -> int:
    if len(digits) > 32:
        raise FileError("holds a number of more than 32 digits")
    return int(digits)


def is_text(value: object) -> bool:
    """Whether a value is a string of at most MAX_TEXT characters."""
    return isinstance(value, str) and len(value) <= MAX_TEXT


def header(
    error: type[ValueError], role: str, values: Sequence[Any], wanted: Sequence[Any]
) -> None:
    """Refuse a file of another format or version. values, wanted: both, in this order."""
    (form, version), (known, newest) = values, wanted
    if form != known:
        raise error(f"{role}: format must be {known!r}")
    if isinstance(version, bool) or version != newest:
        raise error(f"{role}: version must be {newest}; this fastcache reads no other")
