# SPDX-License-Identifier: Apache-2.0
"""Words and marks that do not belong into the tree.

python tests/words.py            # every file under version control; exit 1 where one has some
python tests/words.py FILE ...   # these files
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PRAISE = "praise: say what was measured"
# What is looked for, without regard to case, and why it does not belong here.
BANNED = {
    r"\b(blazing|seamless|cutting[- ]edge|state[- ]of[- ]the[- ]art|game[- ]chang|world[- ]class)": PRAISE,
    r"\b(effortless|revolutionary|supercharge|unleash|leverag(e|es|ed|ing)\b)": PRAISE,
    r"\b(TODO|FIXME|XXX|HACK)\b": "unfinished work: finish it, or say in docs what is left",
    r"(?<![\w.~])/(root|home|Users)/\w": "a path of one machine",
    r"--(extra-)?index-url\s*=?\s*https?://": "the host of a registry: PIP_FLAGS of the Makefile takes one",
    r"^(<{7}|>{7}) ": "a merge that was not finished",
}
SUFFIXES = {
    ".py", ".md", ".cpp", ".h", ".inc", ".cu", ".cuh", ".c", ".sh", ".toml", ".txt", ".yml", ".yaml", ".cff", ".in",
    "",
}  # fmt: skip


def found_in(text: str) -> list[tuple[int, str, str]]:
    """Line, word and reason of everything that does not belong there."""
    return [
        (text.count("\n", 0, match.start()) + 1, match[0].strip(), why)
        for pattern, why in BANNED.items()
        for match in re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE)
    ]


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def places(files: Iterable[Path]) -> list[str]:
    found: list[str] = []
    for path in files:
        known = path.suffix in SUFFIXES and path.is_file() and path != Path(__file__).resolve()
        for line, word, why in found_in(path.read_text("utf-8")) if known else ():
            found.append(f"{path}:{line}: {word!r}: {why}")
    return found


def main(names: list[str]) -> int:
    found = places([Path(name).resolve() for name in names] or tracked())
    print(*found, sep="\n", end="\n" * bool(found))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
