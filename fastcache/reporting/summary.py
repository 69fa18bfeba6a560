# SPDX-License-Identifier: Apache-2.0
"""A cache in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..recipe import Recipe, Rule
from ..runtime.stats import Stats

SHOWN = 4  # names of hooked modules per model


def describe(rule: Rule) -> str:
    """A rule in three words."""
    return " × ".join(type(part).__name__ for part in (rule.when, rule.what, rule.where))


def summarise(
    recipe: Recipe, stats: Stats, hooked: Mapping[str, Sequence[str]], nbytes: int, kernels: str
) -> str:
    """What is hooked, which steps were computed and why, what is held: the text of `Cache.summary`.

    hooked: names of hooked modules by model, empty once disabled. nbytes: bytes of cached tensors.
    kernels: name of the backend.
    """
    lines = [f"fastcache: {recipe.name} on {', '.join(hooked) or 'nothing (disabled)'}"]
    for rule in recipe.rules:
        lines.append(f"  when {rule.when}, what {rule.what}, where {type(rule.where).__name__}")
    for model, names in hooked.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"  hooked in {model}: {', '.join(names[:SHOWN])}{more}")
    lines += stats.lines()
    lines.append(f"cache holds {nbytes / 2**20:.2f} MiB; kernels: {kernels}")
    return "\n".join(lines)
