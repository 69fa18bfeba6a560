# SPDX-License-Identifier: Apache-2.0
"""docs/models.md, from what tests/parity/test_matrix.py holds.

python tests/matrix_page.py --write
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

import test_matrix  # noqa: E402

HEAD = """# Models

Every transformer and ControlNet of diffusers 0.42 that can be built small, with random weights, under every method. In
the test behind this page the inputs stand still, so what a method reuses or forecasts has to be what the model
computes: the output agrees with the uncached one to 2e-4 of its largest value, module calls are saved, and disabling
leaves the model as it was. It shows that the mechanism is right, and says nothing of quality on trained weights. A
number in place of ✓ is the reason, below, why a method is refused; `enable` then raises a ValueError that says so.

A model that is not here needs nothing where its blocks lie in a usual list: `fastcache doctor` tells, and
[models that fastcache does not know](custom-models.md) has the rest. *TaylorSeer lite* is diffusers' `use_lite_mode`;
*guidance* is FasterCache's half of a guidance batch; *Spectrum* and *planned* stand for recipes that forecast by
[`Chebyshev`](recipes.md) and [`Fitted`](recipes.md).
"""
FOOT = """
Written by `python tests/matrix_page.py --write`; a test compares it with the table.
"""
SHOWN = {"lite": "TaylorSeer lite", "guidance": "guidance"}

# A sentence for what a message says, by the words that the test looks for.
REASONS = {
    test_matrix.UNMODULATED: "TeaCache looks at the first block's input after the timestep has come in, and how that "
    "happens is not known here; `BlockAdapter(block=Block(modulation=...))` says it.",
    test_matrix.TOKENS: "It returns a sequence of tokens; the guidance half is rebuilt in the frequencies of an image "
    "or a video; with a known grid, `Guidance(tensor_format='BSC', grid=...)` makes one of it.",
    test_matrix.UNBATCHED: "It returns a list, not one batched tensor whose halves could be told apart.",
    test_matrix.COLLECTED: "It keeps what each of its blocks returns, so none may be skipped; methods on modules and "
    "on the whole output fit.",
    test_matrix.TURNS: "Its lists of blocks take turns, so it has no last blocks to compute always.",
}


def rows() -> Iterator[tuple[str, dict[str, str]]]:
    """Class of each model, and for every method why it is refused, "" where it is not."""
    for name in test_matrix.NAMES:
        refused = test_matrix.REFUSED.get(name, {})
        yield test_matrix.entry(name)["class"], {m: refused.get(m, "") for m in test_matrix.METHODS}


def page() -> str:
    numbers = {reason: i for i, reason in enumerate(REASONS, 1)}
    methods = list(test_matrix.METHODS)
    lines = [HEAD, '<div class="models" markdown>', ""]
    lines.append("| model | " + " | ".join(SHOWN.get(m, m) for m in methods) + " |")
    lines.append("|---" + "|:-:" * len(methods) + "|")
    together: dict[str, dict[str, str]] = {}
    for kind, cells in sorted(rows(), key=lambda row: row[0]):
        held = together.setdefault(kind, cells)  # a class in several forms: refused where any is
        together[kind] = {m: held[m] or cells[m] for m in methods}
    for kind, cells in together.items():
        shown = [str(numbers[cells[m]]) if cells[m] else "✓" for m in methods]
        lines.append(f"| {kind} | " + " | ".join(shown) + " |")
    lines += ["", "</div>", ""]
    lines += [f"{i}. {text}" for i, text in enumerate(REASONS.values(), 1)]
    lines += ["", "Left out:", ""]
    lines += [f"- {kind}: {why}" for kind, why in sorted(test_matrix.LEFT_OUT.items())]
    return "\n".join(lines) + "\n" + FOOT


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page())
