# SPDX-License-Identifier: Apache-2.0
"""What a tuning has found: the best recipe with its evidence, as a table, a picture and a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import FileError
from ..made_for import MadeFor
from ..parts import FILE, NEEDED
from ..policies import Interval
from ..recipe import Recipe
from .plot import plot_rows
from .rows import Row, checked_fields, row_from, values_of
from .table import table

KEY = "tuning"  # of the evidence in a recipe file


@dataclass(frozen=True)
class Tuning:
    """What `fastcache.tune` has found.

    Args:
        best: the recipe to take; None: fewer steps without a cache is better, or no cache at all.
        num_inference_steps: the number of steps to take it with.
        rows: all that was tried, the best first; each a `Row`.
        wish: what was wished for, in words.
        verdict: what came of it, in words.
        evidence: model, scheduler, steps, size, dtype, seeds, reference, seconds, versions: plain values by name.
    """

    best: Recipe | None
    num_inference_steps: int
    rows: tuple[Row, ...]
    wish: str = ""
    verdict: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return table(self.rows, self.wish, self.verdict)

    def plot(self, path: str | Path) -> Path:
        """Draw what was tried: PSNR over the share of the uncached run's time, with and without a cache.

        Args:
            path: of the picture; its ending gives the format.
        Returns:
            The path.
        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_rows(self.rows, self.wish, path)

    def save(self, path: str | Path) -> Path:
        """Write the best recipe with its evidence; `fastcache.enable` takes the file where it ends in ".json".

        Where no cache is best, it is the recipe that computes every step.

        Args:
            path: of the file.
        Returns:
            The path.
        Raises:
            ValueError: the recipe holds what no file can.
            OSError: the file cannot be written.
        """
        recipe = self.best
        if recipe is None:
            recipe = Recipe.of(Recipe(Interval(1)).rules, "no cache", self._made_for)
        values = recipe.to_dict()
        values[KEY] = {
            "cached": self.best is not None,
            "num_inference_steps": self.num_inference_steps,
            "wish": self.wish,
            "verdict": self.verdict,
            "evidence": dict(self.evidence),
            "rows": [values_of(row) for row in self.rows],
        }
        return FILE.save(Path(path), values)

    @property
    def _made_for(self) -> MadeFor:
        known = self.evidence
        taken = int(known.get("steps_of_the_denoiser") or self.num_inference_steps)
        return MadeFor(str(known.get("model", "")), str(known.get("scheduler", "")), taken)

    @classmethod
    def load(cls, path: str | Path) -> Tuning:
        """Read a tuning.

        Args:
            path: of a file that `save` wrote.
        Returns:
            The tuning.
        Raises:
            ValueError: what is wrong with the file; for a missing one it is a FileNotFoundError too.
        """
        return FILE.load(Path(path), cls._read, *NEEDED, KEY)

    @classmethod
    def _read(cls, values: dict[str, Any]) -> Tuning:
        recipe, held = Recipe.from_dict(values), values[KEY]
        found = checked_fields(
            held, "tuning", cached=bool, num_inference_steps=int, wish=str, verdict=str
        )
        evidence, rows = held.get("evidence"), held.get("rows")
        if not isinstance(evidence, dict) or not isinstance(rows, list):
            raise FileError("recipe: tuning must hold evidence and rows")
        best = recipe if found.pop("cached") else None
        made = tuple(row_from(row, f"tuning.rows[{i}]") for i, row in enumerate(rows))
        return cls(best, rows=made, evidence=evidence, **found)
