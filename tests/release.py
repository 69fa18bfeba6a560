# SPDX-License-Identifier: Apache-2.0
"""What a release says of itself, if its tag and the tree agree; needs nothing installed.

python tests/release.py v0.2.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Where the version stands, each as the first match in its file.
PLACES = {
    "fastcache/__init__.py": r'^__version__ = "(.+)"$',
    "CHANGELOG.md": r"^## (\S+)$",
    "CITATION.cff": r"^version: (\S+)$",
}


def notes(tag: str) -> str:
    """The newest section of the change log. Raises ValueError where a place names another version than the tag."""
    for name, pattern in PLACES.items():
        found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        version = found[1] if found else "none"
        if f"v{version}" != tag:
            raise ValueError(f"the tag is {tag!r}, but {name} has version {version}")
    sections = re.split(r"^## \S+$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    return sections[1].strip()


def main(tags: list[str]) -> int:
    try:
        (tag,) = tags
        print(notes(tag))
    except ValueError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
