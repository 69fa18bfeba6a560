# SPDX-License-Identifier: Apache-2.0
"""How signals are measured: a file per kind of signal, and its row here."""

from __future__ import annotations

from typing import Any

from ...policies import Policy
from ..guide import Guide
from .base import Meter
from .block_input import BlockInputChange
from .change import Change
from .filtered import FilteredChange
from .misfit import GuideMisfit
from .model_input import InputChange, InputDistance
from .slope import OutputSlope

# What measures a signal, by where its value is taken and how that becomes a number.
METERS: dict[tuple[str, str], type[Meter]] = {
    ("first_block", "change"): Change,
    ("first_block", "misfit"): GuideMisfit,
    ("block_input", "change"): BlockInputChange,
    ("model_input", "change"): InputChange,
    ("model_input", "distance"): InputDistance,
    ("model_input", "filtered"): FilteredChange,
    ("model_input", "slope"): OutputSlope,
}


def meter_for(when: Policy, rule: int, guide: Guide | None, model: Any = None) -> Meter | None:
    """What measures a policy's signal for a rule, by its number, in a model; None where it looks at nothing.

    Raises ValueError where nothing measures such a signal.
    """
    signal = when.signal
    if signal is None:
        return None
    kind = METERS.get((signal.at, signal.measure))
    if kind is None:
        known = ", ".join(f"{measure} of {at}" for at, measure in METERS)
        raise ValueError(
            f"when: {type(when).__name__} looks at the {signal.measure} of {signal.at}, which nothing measures "
            f"yet; known are {known}"
        )
    return kind(when, rule, guide, model)
