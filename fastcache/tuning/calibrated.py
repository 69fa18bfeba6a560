# SPDX-License-Identifier: Apache-2.0
"""What one run with every step computed tells a search."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..calibration.calibration import Calibration
from ..tools.measure import calibrate
from .lab import Lab


def calibrated(lab: Lab, steps: int) -> Calibration | None:
    """The calibration of a run with the first seed; None where nothing can be measured on this model."""
    share = lab.taken(steps) / lab.cost.usual

    def measured() -> dict[str, Any]:
        lab.afford(share)
        made = lab.generation
        try:
            found = calibrate(
                lambda cache: made.call(cache, steps, lab.seeds[0]), made.target, model="tuned"
            )
        except ValueError:  # nothing is known of where the blocks of this model are
            return {"calibration": None}
        return {"calibration": asdict(found)}

    entry = lab.remembered(f"calibration {steps}", measured)
    lab.tick(share, "calibration")
    values = entry["calibration"]
    return None if values is None else Calibration(**values)
