# SPDX-License-Identifier: Apache-2.0
"""What must hold of the site that was built: every public name is described, and nothing comes from elsewhere.

python docs/_site/check.py site
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pages

TITLE = re.compile(r'<span class="doc-section-title">[^<]*</span>')
SOURCE = re.compile(r"<strong>Source:</strong>")
HEADING = re.compile(r"\b(Args|Returns|Raises|Source):\s")
FOREIGN = re.compile(
    r"<(?:script|img|iframe|source|link rel=\"stylesheet\")[^>]*(?:src|href)=\"(https?:)?//"
)


def sections(page: str) -> dict[str, str]:
    """The HTML of each public name on a page of the reference, by its dotted name."""
    parts = re.split(r'<h2 id="(fastcache\.[\w.]+)"', page)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def lacking(site: Path) -> list[str]:
    """Public names that have no section, and those of which a part of the docstring is plain text there."""
    found: list[str] = []
    for page, *_ in pages.GROUPS:
        held = sections((site / "reference" / f"{page}.html").read_text())
        for name in pages.names_on(page):
            if name not in held:
                found.append(f"{name} is not on {page}.html")
                continue
            own = re.split(r"<h3 id=", held[name])[0]  # without the methods of a class
            left = HEADING.search(re.sub(r"<[^>]+>", "", SOURCE.sub("", TITLE.sub("", own))))
            if left:
                found.append(f"{name}: {left[1]} of its docstring was not understood")
    return found


def foreign(site: Path) -> list[str]:
    """Pages that fetch something from another host."""
    return [
        f"{page.relative_to(site)} fetches {match[0]}"
        for page in sorted(site.rglob("*.html"))
        for match in FOREIGN.finditer(page.read_text())
    ]


def main(site: Path) -> int:
    bad = [*lacking(site), *foreign(site)]
    print(*bad, sep="\n", end="\n" * bool(bad))
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
