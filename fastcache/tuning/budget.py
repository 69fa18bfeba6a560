# SPDX-License-Identifier: Apache-2.0
"""How much a search may take, in the time of uncached runs, references left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BUDGET = 22.0  # of one step count, after which single steps are moved no more
PER_COUNT = 4.0  # more for each further step count
# Of the first, in which predictors and schedules are tried; more beside a converged reference, where a solver's own
# error makes another order of them than is expected.
ACROSS, ACROSS_CONVERGED = 0.5, 0.8


def compared(counts: Sequence[int], converged: bool) -> tuple[int, ...]:
    """The step counts, of those given, the usual one first, that all predictors are compared at.

    Beside a converged reference the usual run's own error hides theirs: the longest run shows them.
    """
    return tuple(dict.fromkeys((max(counts), counts[0]))) if converged else tuple(counts[:1])


def budget(counts: Sequence[int], converged: bool) -> float:
    """About how many uncached runs' time a search takes."""
    return BUDGET * len(compared(counts, converged)) + PER_COUNT * (len(counts) - 1)


def shares(counts: Sequence[int], converged: bool) -> Iterator[tuple[int, float]]:
    """The step counts in the order in which they are looked at, and what each may take for predictors and schedules."""
    first, across = compared(counts, converged), ACROSS_CONVERGED if converged else ACROSS
    for steps in dict.fromkeys((*first, *counts)):
        yield steps, across * BUDGET if steps in first else PER_COUNT
