"""Reading a calibration file that nobody vouches for: its size first, then its nesting, then its fields."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .errors import CalibrationError, CalibrationNotFound

MAX_BYTES = 4 << 20  # of a file


MAX_DEPTH = 6


MAX_PARTS = 200_000  # lists, objects and strings in a file


def read_file(path: Path) -> bytes:
    """A file's bytes, at most MAX_BYTES of them."""
    if not path.exists():
        raise CalibrationNotFound(
            f"calibration {path}: no such file; fastcache.calibrate(...).save(path) writes one"
        )
    if not path.is_file():
        raise CalibrationError(f"calibration {path}: must be a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1) if path.stat().st_size <= MAX_BYTES else b""
    if len(data) > MAX_BYTES or (not data and path.stat().st_size):
        raise CalibrationError(
            f"calibration {path}: is larger than {MAX_BYTES >> 20} MiB, which no calibration is"
        )
    return data


def parse_json(data: bytes, path: Path) -> Any:
    """JSON, its nesting limited before it is parsed. What the file holds never enters a message."""
    problem = _too_deep(data)
    if not problem:
        try:
            return json.loads(data.decode("utf-8"), parse_constant=_refuse, parse_int=_short_int)
        except UnicodeDecodeError:
            problem = "is not UTF-8 text; calibration files are JSON only"
        except json.JSONDecodeError as error:
            problem = f"is not JSON (line {error.lineno}, column {error.colno})"
        except CalibrationError as error:
            problem = str(error)
        except (ValueError, RecursionError):
            problem = "is not JSON"
    raise CalibrationError(f"calibration {path}: {problem}")


_MARK = re.compile(rb'["\[\]{}]')


def _too_deep(data: bytes) -> str:
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
        if depth > MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} levels, which no calibration is"
    return "holds more lists and strings than any calibration does"


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
    raise CalibrationError("holds NaN or Infinity; every number must be finite")


def _short_int(digits: str) -> int:
    if len(digits) > 32:
        raise CalibrationError("holds a number of more than 32 digits")
    return int(digits)
