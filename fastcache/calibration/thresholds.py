"""From a calibration to thresholds: any one is played through without another run."""

from __future__ import annotations

import math

from ..checks import real
from .errors import CalibrationError


def share_of(value: object) -> float:
    share = real("calibration", "target_fraction", value, 0.0)
    if not 0 < share <= 1:
        raise CalibrationError(f"calibration: target_fraction is {share:g}, must be in (0, 1]")
    return share


def round_up(value: float) -> float:
    """The next number of four digits that is not below `value`."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return float(f"{math.ceil(value / scale - 1e-9) * scale:.6g}")
