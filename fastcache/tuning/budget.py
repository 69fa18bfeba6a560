# SPDX-License-Identifier: Apache-2.0
"""How much a search may take, in the time of uncached runs, references left out."""

from __future__ import annotations

from collections.abc import Sequence

BUDGET = 28.0  # of one step count, after which single steps are moved no more
PER_COUNT = 4.0  # more for each further step count


def compared(counts: Sequence[int], converged: bool) -> tuple[int, ...]:
    """The step counts, of those given, the usual one first, that all predictors are compared at.

    Beside a converged reference the usual run's own error hides theirs: the longest run shows them.
    """
    return tuple(dict.fromkeys((max(counts), counts[0]))) if converged else tuple(counts[:1])


def budget(counts: Sequence[int], converged: bool) -> float:
    """About how many uncached runs' time a search takes."""
    return BUDGET * len(compared(counts, converged)) + PER_COUNT * (len(counts) - 1)
