# SPDX-License-Identifier: Apache-2.0
"""What a tuning says of what it was asked and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .rows import Row

NEAR = 6.0  # dB by which the reference should be nearer to itself than a run is to it
AS_FAST = 0.95  # of a run's speed-up, from which on another one counts as being as fast
DIFFERENT = 60.0  # dB between two uncached runs, below which that is said


def verdict(rows: Sequence[Row], usual: int, met: bool, complete: bool) -> str:
    """The outcome, in sentences. rows: the best first. usual: steps of the usual run."""
    said = [] if complete else ["The time limit ended the search."]
    if not rows:
        return " ".join([*said, "Nothing was judged: give more minutes."])
    best = rows[0]
    if not met:
        said.append("Nothing that was tried is as was wished; this comes closest.")
    if best.recipe is None:
        name = "the uncached run" if best.steps == usual else f"{best.steps} steps without a cache"
        said.append(f"Caching does not pay here: best is {name}, {_figures(best)}.")
        return " ".join(said)
    said.append(f"Take {best.name} with num_inference_steps={best.steps}: {_figures(best)}.")
    as_fast = [r for r in rows if r.recipe is None and r.speedup >= AS_FAST * best.speedup]
    if as_fast:
        plain = max(as_fast, key=lambda r: r.psnr)
        said.append(f"Best without a cache: {plain.steps} steps, {_figures(plain)}.")
    return " ".join(said)


def doubts(best: Row | None, converges: float | None, repeats: float) -> str:
    """What the figures cannot tell. converges: dB between the reference and a run of half its steps, None where
    that was not asked. repeats: dB between two uncached runs."""
    found = []
    if best is not None and converges is not None and converges < best.psnr + NEAR:
        found.append(
            f" The reference itself is known to about {converges:.0f} dB: more steps still change it by as much."
        )
    if repeats < DIFFERENT:
        found.append(f" Two uncached runs are {repeats:.0f} dB apart, which no figure can exceed.")
    return "".join(found)


def _figures(row: Row) -> str:
    quality = "equal to the reference" if math.isinf(row.psnr) else f"{row.psnr:.1f} dB"
    return f"{quality}, {row.speedup:.2f} times as fast, {row.computed:.4g} steps computed"
