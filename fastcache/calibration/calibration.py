# SPDX-License-Identifier: Apache-2.0
"""What a calibration run has measured, as an object: magnitude ratios and first-block changes.

A calibration run computes every step. From it follow MagCache's ratios and, for any threshold, the
schedule that FirstBlockCache would have chosen along the same trajectory. It is saved as JSON only;
a file is read with its size, nesting and every value checked, and is never quoted in messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..configs import MagCacheConfig, TeaCacheConfig
from ..files import MAX_TEXT, header, is_text
from ..runtime.notices import warn
from . import thresholds
from .errors import CalibrationError
from .fields import (
    FILE,
    FORMAT,
    MAX_STEPS,
    VERSION,
    gram_rows,
    matrix_rows,
    named_rows,
    pair_rows,
    ratio_list,
)
from .fit import POOR, InputFit, fitted
from .planner import Plans
from .plot import plot_calibration


@dataclass(frozen=True)
class Calibration(Plans):
    """What was measured of a model's runs; made by `fastcache.calibrate`.

    Args:
        mag_ratios: mean over tokens of |r_i| / |r_(i-1)|, r the residual of all blocks, unitless, one
            per step; the first is 1. Mean over contexts and runs.
        contexts: the same by context, such as "cond" and "uncond".
        first_block: by context, row i holds the relative L1 change of the first block's residual at
            step i against steps i-1, i-2, ..., unitless; empty where it was not measured.
        input_changes: by context, pairs of relative L1 changes from one step to the next, of the first block's
            modulated input and of the model's output, unitless, of all runs; empty where it was not measured.
        grams: by context, row i holds the inner products of what all blocks add at step i with that of the steps
            0 to i, relative to their mean square, mean over runs; empty where it was not measured.
        guides: the same of what a guided predictor looks at, by its name, "residual" and "modulated", and by context;
            empty where it was not measured.
        model, scheduler: names of classes, "" where not known.
        steps: denoiser calls per context and run, a count; 0: one per ratio.
        runs: generations that were averaged, a count.
        source: where the numbers come from, in words.
        created: date and time, ISO 8601.
        format, version: of the file; this version reads and writes no other.
    Raises:
        CalibrationError: a field is of another type or out of its range; the message names it.
    Source: ratios of MagCache (arXiv 2506.09045), changes of FirstBlockCache (diffusers 0.42.1).
    """

    mag_ratios: tuple[float, ...]
    contexts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    first_block: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    input_changes: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    grams: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    guides: Mapping[str, Mapping[str, tuple[tuple[float, ...], ...]]] = field(default_factory=dict)
    model: str = ""
    scheduler: str = ""
    steps: int = 0
    runs: int = 1
    source: str = ""
    created: str = ""
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        header(CalibrationError, "calibration", (self.format, self.version), (FORMAT, VERSION))
        ratios = ratio_list("mag_ratios", self.mag_ratios)
        contexts = named_rows("contexts", self.contexts)
        first_block = named_rows("first_block", self.first_block)
        inputs = named_rows("input_changes", self.input_changes)
        grams = named_rows("grams", self.grams)
        guides = named_rows("guides", self.guides)
        checked = {
            "mag_ratios": ratios,
            "contexts": {name: ratio_list("contexts", rows) for name, rows in contexts},
            "first_block": {name: matrix_rows(rows) for name, rows in first_block},
            "input_changes": {name: pair_rows(rows) for name, rows in inputs},
            "grams": {name: gram_rows(rows) for name, rows in grams},
            "guides": {
                guide: {name: gram_rows(rows) for name, rows in named_rows("guides", found)}
                for guide, found in guides
            },
            "steps": self.steps or len(ratios),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name in ("model", "scheduler", "source", "created"):
            if not is_text(getattr(self, name)):
                raise CalibrationError(
                    f"calibration: {name} must be a string of at most {MAX_TEXT} characters"
                )
        for name in ("steps", "runs"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_STEPS:
                raise CalibrationError(
                    f"calibration: {name} must be a whole number in 1..{MAX_STEPS}"
                )

    def __getitem__(self, context: str) -> tuple[float, ...]:
        return self.contexts[context]

    def __str__(self) -> str:
        ratios = self.mag_ratios[1:] or self.mag_ratios
        return (
            f"calibration of {self.model or 'a model'}, {self.steps} steps, contexts "
            f"{list(self.contexts)}: ratios {min(ratios):.3f} to {max(ratios):.3f}"
        )

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the calibration as JSON.

        Args:
            path: of the file.
        Returns:
            The path.
        Raises:
            OSError: the file cannot be written.
        """
        return FILE.save(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration.

        Args:
            path: of a JSON file that `save` wrote.
        Returns:
            The calibration.
        Raises:
            CalibrationError: what is wrong with the file; for a missing one it is a FileNotFoundError too.
        """
        known = {f.name for f in fields(cls)}
        made = lambda values: cls(**{k: v for k, v in values.items() if k in known})  # noqa: E731
        return FILE.load(Path(path), made, "format", "version", "mag_ratios")

    # --- using it ------------------------------------------------------------------------------

    def config(self, **overrides: Any) -> MagCacheConfig:
        """A MagCacheConfig with these ratios and steps.

        Args:
            overrides: its other fields.
        Returns:
            The config.
        Raises:
            TypeError, ValueError: a field is wrong; the message names it.
        """
        return MagCacheConfig(
            **{"num_inference_steps": self.steps, "mag_ratios": self.mag_ratios, **overrides}
        )

    def input_fit(self, context: str | None = None) -> InputFit:
        """TeaCache's polynomial for this model, of degree 4.

        Args:
            context: a name in `input_changes`; None takes all contexts together.
        Returns:
            `coefficients`, highest power first, and `r2`, the share of the variance that they explain.
        Raises:
            CalibrationError: nothing was measured, or nothing of this context.
        """
        changes = self.input_changes
        if not changes:
            raise CalibrationError(
                "calibration: input_changes is empty; fastcache.calibrate(run, target) records them of models whose "
                "first block's modulation is known: name it with fastcache.Block(modulation=...)"
            )
        if context is not None and context not in changes:
            raise CalibrationError(f"calibration: context must be one of {list(changes)}")
        names = changes if context is None else [context]
        return fitted([pair for name in names for pair in changes[name]])

    def tea_cache(self, **overrides: Any) -> TeaCacheConfig:
        """A TeaCacheConfig with the polynomial of this model, and a warning where that explains little.

        Args:
            overrides: its other fields.
        Returns:
            The config.
        Raises:
            TypeError, ValueError: a field is wrong, or nothing was measured; the message names it.
        """
        fit = self.input_fit()
        if not fit.r2 >= POOR:
            warn(
                f"fastcache: calibration: the {fit}: the input says little of how the output changes here; compare "
                "with coefficients=(1, 0), or take another method"
            )
        given = {"num_inference_steps": self.steps, "coefficients": fit.coefficients}
        return TeaCacheConfig(**{**given, **overrides})

    def computed_steps(
        self, threshold: float, context: str | None = None, **guards: Any
    ) -> list[int]:
        """Steps that FirstBlockCache computes at a threshold, along the calibrated trajectory.

        Args:
            threshold: relative L1 change, unitless.
            context: a name in `first_block`; None takes the first one.
            guards: other fields of `fastcache.FirstBlock`.
        Returns:
            Step indices, ascending.
        Raises:
            CalibrationError: there are no first-block changes, or none of this context.
        """
        changes = self._changes()
        if context is None:
            context = next(iter(changes))
        if context not in changes:
            raise CalibrationError(f"calibration: context must be one of {list(changes)}")
        return thresholds.computed_steps(changes[context], threshold, **guards)

    def first_block_share(self, threshold: float, **guards: Any) -> float:
        """Share of steps that FirstBlockCache computes at a threshold, over all contexts.

        Args:
            threshold: relative L1 change, unitless.
            guards: other fields of `fastcache.FirstBlock`.
        Returns:
            0 to 1.
        Raises:
            CalibrationError: there are no first-block changes.
        """
        return thresholds.first_block_share(self._changes().values(), threshold, **guards)

    def first_block_threshold(self, target_fraction: float, **guards: Any) -> float:
        """The smallest threshold at which FirstBlockCache computes at most this share of steps.

        Args:
            target_fraction: share of steps, larger than 0, at most 1.
            guards: other fields of `fastcache.FirstBlock`.
        Returns:
            Relative L1 change, unitless, four digits.
        Raises:
            TypeError: `target_fraction` is no number.
            CalibrationError: it is out of its range or cannot be reached, or there are no changes.
        """
        changes = self._changes().values()
        return thresholds.first_block_threshold(changes, target_fraction, **guards)

    def mag_share(self, threshold: float, **fields: Any) -> float:
        """Share of steps that MagCache computes at a threshold.

        Args:
            threshold: accumulated error, unitless.
            fields: others of `fastcache.Magnitude`, such as max_skip_steps and retention_ratio.
        Returns:
            0 to 1.
        """
        return thresholds.mag_share(self.mag_ratios, self.steps, threshold, **fields)

    def mag_threshold(self, target_fraction: float, **fields: Any) -> float:
        """The smallest threshold at which MagCache computes at most this share of the steps.

        Args:
            target_fraction: share of steps, larger than 0, at most 1.
            fields: others of `fastcache.Magnitude`, such as max_skip_steps and retention_ratio.
        Returns:
            Accumulated error, unitless.
        Raises:
            TypeError: `target_fraction` is no number.
            CalibrationError: it is out of its range or cannot be reached.
        """
        return thresholds.mag_threshold(self.mag_ratios, self.steps, target_fraction, **fields)

    def plot(self, path: str | Path) -> Path:
        """Draw the ratios, the first-block changes and what a threshold buys into a picture.

        Args:
            path: of the picture; its ending gives the format.
        Returns:
            The path.
        Raises:
            ImportError: matplotlib is not installed.
        """
        title = f"calibration of {self.model or 'a model'}, {self.steps} steps"
        if self.scheduler:
            title += f", {self.scheduler}"
        return plot_calibration(
            path, title, self.steps, self.mag_ratios, self.contexts, self.first_block
        )

    def _changes(self) -> Mapping[str, tuple[tuple[float, ...], ...]]:
        if not self.first_block:
            raise CalibrationError(
                "calibration: first_block is empty; fastcache.calibrate(run, target) records it"
            )
        return self.first_block
