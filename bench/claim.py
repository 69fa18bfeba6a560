# SPDX-License-Identifier: Apache-2.0
"""A promise, held against committed results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A promise, the number found and its bound."""

    area: str
    text: str
    found: str
    bound: str
    met: bool


def at_least(area: str, text: str, value: float, bound: float, unit: str = "×") -> Claim:
    return Claim(
        area, text, f"{value:.2f}{unit}", f"at least {bound:g}{unit}", value >= bound - 1e-9
    )
