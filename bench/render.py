# SPDX-License-Identifier: Apache-2.0
"""A page as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from .page import Block

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;max-width:76rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto;font-size:13px}
th,td{padding:.25rem .6rem;border-bottom:1px solid #e4e7eb;text-align:left}.short{white-space:nowrap}
th{background:#f5f7fa}td{font-variant-numeric:tabular-nums}
img{max-width:100%}code,pre{background:#f5f7fa;padding:.1rem .3rem}
h2{margin-top:2.5rem;border-bottom:2px solid #2f6db3}.no{color:#b3261e;font-weight:600}
"""


KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


def to_html(page: Sequence[Block], images: Path) -> str:
    """One file that needs nothing beside it."""
    parts = []
    for b in page:
        if b.kind in ("h1", "h2", "h3"):
            parts.append(f"<{b.kind}>{html.escape(b.text)}</{b.kind}>")
        elif b.kind == "code":
            parts.append(f"<pre>{html.escape(b.text)}</pre>")
        elif b.kind == "image":
            path = images / b.text
            if path.exists():
                data = base64.b64encode(path.read_bytes()).decode()
                parts.append(f'<img alt="{b.text}" src="data:{KINDS[path.suffix]};base64,{data}">')
        elif b.kind in ("table", "folded"):
            head = "".join(f"<th>{_inline(c)}</th>" for c in b.columns)
            rows = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in b.rows)
            made = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            summary = f"<details><summary>{html.escape(b.text)}</summary>{made}</details>"
            parts.append(summary if b.kind == "folded" else made)
        else:
            parts.append(f"<p>{_inline(b.text)}</p>")
    title = "<title>fastcache benchmarks</title>"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{title}'
    body = "\n".join(parts)
    return f"{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"


SHORT = 28  # characters of a cell that is not broken over lines


def _html_cell(text: str) -> str:
    short = ' class="short"' if len(text) <= SHORT else ""
    return f"<td{short}>{_inline(text)}</td>"


def _inline(text: str) -> str:
    """Escaped text with `code` and **bold**."""
    out = html.escape(text)
    for sign, tag in (("**", "b"), ("`", "code")):
        pieces = out.split(sign)
        if len(pieces) % 2:
            out = "".join(f"<{tag}>{p}</{tag}>" if i % 2 else p for i, p in enumerate(pieces))
    return out.replace("<b>not met</b>", '<span class="no">not met</span>')
