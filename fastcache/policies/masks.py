# SPDX-License-Identifier: Apache-2.0
"""Schedules by name, as 0 and 1 per step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from ..checks import whole

Bins = tuple[
    tuple[int, ...], tuple[int, ...]
]  # lengths of computed and of reused stretches, by turns

# cache-dit 1.5.3's policies, by the number of steps that they are written for.
BINS: dict[int, dict[str, Bins]] = {
    28: {
        "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
        "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
        "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
        "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
    },
    15: {
        "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
        "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
        "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
        "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
    },
    9: {
        "slow": ((5, 2, 1), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
    8: {
        "slow": ((5, 1, 1), (1,)),
        "medium": ((4, 1, 1), (1, 1)),
        "fast": ((3, 1, 1), (1, 2)),
        "ultra": ((2, 1, 1), (2, 2)),
    },
    6: dict.fromkeys(("slow", "medium", "fast", "ultra"), ((3, 1), (2,))),
    4: dict.fromkeys(("slow", "medium", "fast", "ultra"), ((2, 1), (1,))),
}
LONGEST = max(BINS)
NAMES = tuple(BINS[LONGEST])


def steps_mask(
    policy: str | tuple[Sequence[int], Sequence[int]], num_inference_steps: int
) -> list[int]:
    """A schedule by name, or by the lengths of its stretches, for `fastcache.Mask`.

    Args:
        policy: "slow", "medium", "fast" or "ultra", from most to fewest computed steps, whose last step is
            computed; or (compute_bins, cache_bins), counts of steps that are computed and reused by turns,
            the first of them computed.
        num_inference_steps: denoiser calls of a run, a count: 4, 6, or 8 and more for a name; for bins at
            most their sum, beyond which they are cut off.
    Returns:
        One entry per step, 1 for a computed and 0 for a reused one.
    Raises:
        TypeError: an argument is of another type; the message names it.
        ValueError: `policy` is no such name, or `num_inference_steps` is out of its range.
    Source: the step masks of cache-dit 1.5.3, which this equals.
    """
    n = whole("steps_mask", "num_inference_steps", num_inference_steps, 1)
    if isinstance(policy, str):
        mask = _written(*_named(policy, n), n)
        mask[-1] = 1
        return mask
    if not isinstance(policy, Sequence) or len(policy) != 2:
        raise TypeError(
            f"steps_mask: policy is {policy!r}, must be one of {NAMES} or (compute_bins, cache_bins)"
        )
    computed, reused = (_counts(f"policy[{i}]", bins) for i, bins in enumerate(policy))
    if sum(computed) + sum(reused) < n:
        raise ValueError(
            f"steps_mask: num_inference_steps is {n}, must be at most the sum of the bins, "
            f"{sum(computed) + sum(reused)}"
        )
    return _written(computed, reused, n)


def _counts(name: str, bins: object) -> list[int]:
    if isinstance(bins, str) or not isinstance(bins, Sequence):
        raise TypeError(f"steps_mask: {name} is {bins!r}, must be a sequence of counts")
    return [whole("steps_mask", name, count, 0) for count in bins]


def _written(computed: Sequence[int], reused: Sequence[int], n: int) -> list[int]:
    mask: list[int] = []
    for ones, zeros in zip_longest(computed, reused, fillvalue=0):
        mask += [1] * ones + [0] * zeros
    return mask[:n]


def _named(name: str, n: int) -> tuple[list[int], list[int]]:
    """The bins of a named policy at `n` steps: those of the next row, shrunk, or those of 28, stretched."""
    if name not in NAMES:
        raise ValueError(f"steps_mask: policy is {name!r}, must be one of {NAMES}")
    if n < 8 and n not in BINS:
        raise ValueError(
            f"steps_mask: num_inference_steps is {n}, must be 4, 6, or 8 and more for a policy by name"
        )
    # from 16 steps on, the first ones of a run of 28
    row = min((steps for steps in BINS if steps >= n), default=LONGEST)
    computed, reused = map(list, BINS[row][name])
    _stretch(computed, reused, n)
    _shrink(computed, reused, n)
    return computed, reused


def _stretch(computed: list[int], reused: list[int], n: int) -> None:
    """Lengthen the bins by turns until they hold `n` steps: half of what the longer run would ask for, at
    least one, and after every round one more computed step at the end."""
    grown = [
        (b, max(b[i] * n // (2 * LONGEST), 1), i)
        for i in range(len(reused))
        for b in (computed, reused)
    ]
    grown.append((computed, 1, -1))
    while True:
        for bins, more, i in grown:
            if sum(computed) + sum(reused) >= n:
                return
            bins[i] += more


def _shrink(computed: list[int], reused: list[int], n: int) -> None:
    """Take steps off the end, reused and computed ones by turns, until `n` are left."""
    while True:
        for bins in (reused, computed):
            if sum(computed) + sum(reused) <= n:
                return
            if bins:
                bins[-1] -= 1
                if not bins[-1]:
                    bins.pop()
