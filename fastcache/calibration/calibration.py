"""Measure a model once, keep the result as an object: magnitude ratios and first-block changes.

A calibration run computes every step. From it follow MagCache's ratios and, for any threshold, the
schedule that FirstBlockCache would have chosen along the same trajectory. It is saved as JSON only;
a file is read with its size, nesting and every value checked, and is never quoted in messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..configs import MagCacheConfig
from ..policies import COMPUTE, REUSE, FirstBlock, Magnitude, Step
from .errors import CalibrationError
from .fields import (
    FORMAT,
    MAX_STEPS,
    MAX_TEXT,
    VERSION,
    is_text,
    matrix_rows,
    named_rows,
    ratio_list,
)
from .file import parse_json, read_file
from .thresholds import round_up, share_of


@dataclass(frozen=True)
class Calibration:
    """What a model's run looks like to a cache.

    mag_ratios: mean over tokens of |r_i| / |r_(i-1)|, r the residual of all blocks, one per step;
    the first is 1. Mean over contexts and runs. contexts: the same by context, such as "cond" and
    "uncond". first_block: by context, row i holds the relative L1 change of block 0's residual at
    step i against steps i-1, i-2, ...; empty where it was not measured. steps: denoiser calls per
    context and run.
    """

    mag_ratios: tuple[float, ...]
    contexts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    first_block: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    model: str = ""
    scheduler: str = ""
    steps: int = 0
    runs: int = 1
    source: str = ""
    created: str = ""
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if self.format != FORMAT:
            raise CalibrationError(f"calibration: format must be {FORMAT!r}")
        if isinstance(self.version, bool) or self.version != VERSION:
            raise CalibrationError(
                f"calibration: version must be {VERSION}; this fastcache reads no other"
            )
        put("mag_ratios", ratio_list("mag_ratios", self.mag_ratios))
        put(
            "contexts",
            {n: ratio_list("contexts", r) for n, r in named_rows("contexts", self.contexts)},
        )
        put(
            "first_block",
            {n: matrix_rows(r) for n, r in named_rows("first_block", self.first_block)},
        )
        for name in ("model", "scheduler", "source", "created"):
            if not is_text(getattr(self, name)):
                raise CalibrationError(
                    f"calibration: {name} must be a string of at most {MAX_TEXT} characters"
                )
        put("steps", self.steps or len(self.mag_ratios))
        for name in ("steps", "runs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_STEPS:
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
        """Write the calibration as JSON and return the path."""
        path = Path(path)
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration.

        Raises CalibrationError, a ValueError, that says what is wrong with the file; for a missing
        one CalibrationNotFound, which is a FileNotFoundError too.
        """
        path = Path(path)
        values = parse_json(read_file(path), path)
        known = {f.name for f in fields(cls)}
        problem = ""
        if not isinstance(values, dict):
            problem = "must hold a JSON object"
        elif missing := [n for n in ("format", "version", "mag_ratios") if n not in values]:
            problem = f"has no {missing[0]}"
        if problem:
            raise CalibrationError(f"calibration {path}: {problem}")
        try:
            return cls(**{k: v for k, v in values.items() if k in known})
        except CalibrationError as error:
            problem = str(error).removeprefix("calibration: ")
        raise CalibrationError(f"calibration {path}: {problem}")

    # --- using it ------------------------------------------------------------------------------

    def config(self, **overrides: Any) -> MagCacheConfig:
        """A MagCacheConfig with these ratios and steps; `overrides` are its other fields."""
        return MagCacheConfig(
            **{"num_inference_steps": self.steps, "mag_ratios": self.mag_ratios, **overrides}
        )

    def computed_steps(self, threshold: float, context: str | None = None, **guards: Any) -> list:
        """Steps that FirstBlockCache computes at a threshold, along the calibrated trajectory.

        guards: of `fastcache.FirstBlock`. context: None takes the first one.
        """
        rows = self._rows_of(context)
        policy = FirstBlock(threshold, **guards)
        run, computed = policy.begin(len(rows)), [0]
        policy.decide(run, Step(0, len(rows)))
        for i in range(1, len(rows)):
            back = i - computed[-1]
            change = rows[i][back - 1] if back <= len(rows[i]) else None
            if policy.decide(run, Step(i, len(rows)), change).action != REUSE:
                computed.append(i)
        return computed

    def first_block_share(self, threshold: float, **guards: Any) -> float:
        """Share of steps that FirstBlockCache computes at a threshold, over all contexts."""
        self._rows_of(None)
        counts = [len(self.computed_steps(threshold, name, **guards)) for name in self.first_block]
        return sum(counts) / sum(map(len, self.first_block.values()))

    def first_block_threshold(self, target_fraction: float, **guards: Any) -> float:
        """The smallest threshold at which FirstBlockCache computes at most this share of steps."""
        target = share_of(target_fraction)
        seen = sorted({c for rows in self.first_block.values() for row in rows for c in row})
        for threshold in (0.0, *(round_up(c) for c in seen if math.isfinite(c))):
            if self.first_block_share(threshold, **guards) <= target:
                return threshold
        least = self.first_block_share(math.ceil(seen[-1] + 1) if seen else 1.0, **guards)
        raise CalibrationError(
            f"calibration: target_fraction is {target:g}, but no threshold computes fewer than "
            f"{least:.0%} of the steps; ask for more, or lower warmup"
        )

    def mag_threshold(self, target_fraction: float, **fields: Any) -> float:
        """The smallest threshold at which MagCache computes at most this share of the steps.

        fields: others of `fastcache.Magnitude`, such as max_skip_steps and retention_ratio.
        """
        target = share_of(target_fraction)
        for i in range(1, 401):
            threshold = i / 100 if i <= 100 else 1.02 ** (i - 100)
            if self.mag_share(threshold, **fields) <= target:
                return round(threshold, 4)
        raise CalibrationError(
            f"calibration: target_fraction is {target:g}, but no threshold computes fewer than "
            f"{self.mag_share(1e6, **fields):.0%} of the steps; raise max_skip_steps or lower "
            "retention_ratio"
        )

    def mag_share(self, threshold: float, **fields: Any) -> float:
        """Share of steps that MagCache computes at a threshold."""
        values = {"num_inference_steps": self.steps, "mag_ratios": self.mag_ratios, **fields}
        policy = Magnitude(threshold, **values).guarded(warmup=0, max_skips=0, last=False)
        run = policy.begin(self.steps)
        steps = [policy.decide(run, Step(i, self.steps)).action for i in range(self.steps)]
        return steps.count(COMPUTE) / self.steps

    def plot(self, path: str | Path) -> Path:
        """Draw the ratios, the first-block changes and what a threshold buys into a picture."""
        from .plot import plot_calibration

        return plot_calibration(self, path)

    def _rows_of(self, context: str | None) -> tuple[tuple[float, ...], ...]:
        if not self.first_block:
            raise CalibrationError(
                "calibration: first_block is empty; fastcache.calibrate(run, target) records it"
            )
        if context is None:
            return next(iter(self.first_block.values()))
        if context not in self.first_block:
            raise CalibrationError(f"calibration: context must be one of {list(self.first_block)}")
        return self.first_block[context]
