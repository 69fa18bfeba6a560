# SPDX-License-Identifier: Apache-2.0
"""How near a run with skipped steps should come to the computed one, told from one run with every step computed.

The error of a forecast is a sum of that run's values, whose inner products are known. The errors of all skipped steps
add up in the latents, each as a share of its step's value, since a model's last normalisation divides by about that.
What an error changes in later steps is not in it, so that whole runs have the last word: it says which are worth it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..predictors import Predictor
from .grams import Array, Rows, gram_of
from .missed import Missed

# How much of each skipped step's error counts by itself: errors that cancel on one run may not on another.
ALONE = 0.3
# Where nothing was measured: how far values reach that turn slowly, in runs; what is each value's own, and the first's.
SMOOTH, OWN, FIRST = 0.25, 1e-3, 0.1
LEAST = 1e-12  # the error of a run that is as good as computed


@dataclass(frozen=True)
class Context:
    """What one context's run has shown: inner products of its values [T, T], and of guides by their names."""

    gram: Array
    guides: Mapping[str, Array]

    @property
    def lengths(self) -> Array:
        """How much an error at a step counts, [T]: as a share of its value, and of the way that one step goes."""
        sizes: Array = np.sqrt(np.maximum(np.diag(self.gram), LEAST))
        return 1 / (sizes * len(sizes))


class Outlook:
    """What is to be expected of predictors and schedules in runs of one length.

    Args:
        steps: of a run, as the denoiser counts them.
        grams, guides: as in a `Calibration` of such a run; without them values are taken to turn slowly.
        lengths: how far each step moves the latents, one number per step; None: all as far.
    """

    def __init__(
        self,
        steps: int,
        grams: Mapping[str, Rows] | None = None,
        guides: Mapping[str, Mapping[str, Rows]] | None = None,
        lengths: Sequence[float] | None = None,
    ) -> None:
        self.steps = steps
        measured = _contexts(grams or {}, guides or {})
        self.contexts = [c for c in measured if len(c.gram) == steps] or [_smooth(steps)]
        self.guides = frozenset.intersection(*(frozenset(c.guides) for c in self.contexts))
        scale = np.ones(steps) if lengths is None else np.asarray(lengths, dtype=np.float64)
        self.lengths = [context.lengths * scale for context in self.contexts]
        self._missed: dict[Predictor, list[Missed]] = {}  # by context
        # by predictor, the computed steps before a gap, and the one after it: by context what it adds
        self._gaps: dict[tuple[Predictor, tuple[int, ...], int], list[tuple[Array, float]]] = {}
        self._told: dict[tuple[Predictor, tuple[bool, ...]], float] = {}

    def knows(self, what: Predictor) -> bool:
        """Whether the weights of a predictor follow from what is known."""
        guide = what.on_block("modulated" in self.guides).guide
        plain = what.fitted is None and not (what.per_module or what.table or what.feeds_back)
        return plain and bool(what.depth) and (guide is None or guide in self.guides)

    def expected(self, what: Predictor, marks: tuple[bool, ...]) -> float:
        """How near a run should come, dB on a scale of its own: what is nearer is larger.

        what: one that is known. marks: one per step, True for a computed one, the first of them True.
        """
        key = what, marks
        if key not in self._told:
            self._told[key] = -10 * math.log10(max(self._error(what, marks), LEAST))
        return self._told[key]

    def _error(self, what: Predictor, marks: Sequence[bool]) -> float:
        """The mean square of what all skipped steps leave in the latents, mean over contexts."""
        kept: tuple[int, ...] = ()
        moved, alone = [np.zeros(self.steps) for _ in self.contexts], [0.0 for _ in self.contexts]
        for step, then in pairwise([*(i for i, mark in enumerate(marks) if mark), self.steps]):
            kept = (step, *kept)[: what.depth]
            if then - step > 1:
                for i, (together, single) in enumerate(self._gap(what, kept, then)):
                    moved[i] = moved[i] + together
                    alone[i] += single
        errors = [
            float(m @ c.gram @ m) + ALONE * a
            for m, a, c in zip(moved, alone, self.contexts, strict=True)
        ]
        return sum(errors) / len(errors)

    def _gap(self, what: Predictor, kept: tuple[int, ...], then: int) -> list[tuple[Array, float]]:
        """What the steps between the newest of `kept` and `then` leave: together, as coefficients of values [T], and
        each by itself, squares added up."""
        key = what, kept, then
        if key not in self._gaps:
            self._gaps[key] = list(self._left(what, kept, then))
        return self._gaps[key]

    def _left(
        self, what: Predictor, kept: tuple[int, ...], then: int
    ) -> Iterator[tuple[Array, float]]:
        if what not in self._missed:
            known = what.on_block("modulated" in self.guides)
            self._missed[what] = [
                Missed(self.steps, known, c.gram, c.guides.get(known.guide or ""))
                for c in self.contexts
            ]
        for context, lengths, missed in zip(
            self.contexts, self.lengths, self._missed[what], strict=True
        ):
            steps = range(kept[0] + 1, then)
            errors = np.array([lengths[step] * missed(kept, step) for step in steps])
            yield errors.sum(0), float(np.einsum("ij,jk,ik->", errors, context.gram, errors))


def _contexts(
    grams: Mapping[str, Rows], guides: Mapping[str, Mapping[str, Rows]]
) -> Iterator[Context]:
    for name, rows in grams.items():
        seen = {
            guide: gram_of(found, name)
            for guide, found in guides.items()
            if name in found and len(found[name]) == len(rows)
        }
        yield Context(gram_of(grams, name), seen)


def _smooth(steps: int) -> Context:
    """Values that turn slowly, that of step 0 apart from the others, and guides that turn faster."""
    apart = np.subtract.outer(np.arange(steps), np.arange(steps)) / steps
    values, guide = (np.exp(-0.5 * (apart / reach) ** 2) for reach in (SMOOTH, SMOOTH / 2))
    values += OWN * np.eye(steps)
    values[0, 0] += FIRST
    return Context(values, {"residual": guide, "modulated": guide})
