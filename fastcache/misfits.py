# SPDX-License-Identifier: Apache-2.0
"""Which of when, what and where do not go together, and why."""

from __future__ import annotations

from .policies import Calibrate, Policy
from .predictors import Extrapolate, Guided, Predictor, TaylorTable, Zeros
from .targets.spec import Output, Stack, Target

# Combinations that make no sense, and why: (kind of when, of what, of where) with None for any.
REFUSED: tuple[tuple[type | None, type | None, type | None, str], ...] = (
    (
        None,
        Zeros,
        Stack,
        "Zeros in place of the whole stack would drop the image; use Reuse() or Taylor()",
    ),
    (
        None,
        Extrapolate,
        Stack,
        "Extrapolate is FasterCache's rule for attention; for a stack use Taylor(order=1)",
    ),
    (
        None,
        TaylorTable,
        Stack,
        "TaylorTable is diffusers' form for modules; for a stack use Taylor(order=...)",
    ),
    (
        None,
        Zeros,
        Output,
        "Zeros in place of the whole output would drop the image; use Reuse() or Taylor()",
    ),
    (
        None,
        Extrapolate,
        Output,
        "Extrapolate is FasterCache's rule for attention; for an output use Taylor(order=1)",
    ),
    (
        None,
        Guided,
        Output,
        "Guided looks at this step's first block, and an Output runs none; use Taylor(order=1)",
    ),
    (
        Calibrate,
        None,
        Output,
        "Calibrate measures the residual of a Stack(); calibrate with that",
    ),
)


def refuse_misfits(when: Policy, what: Predictor, where: Target) -> None:
    """Raise a ValueError with the reason where the three do not go together."""
    for policy, predictor, target, reason in REFUSED:
        if all(
            kind is None or isinstance(value, kind)
            for kind, value in ((policy, when), (predictor, what), (target, where))
        ):
            raise ValueError(f"Recipe: when, what and where do not go together: {reason}")
    if when.decides_inside and where.scope != "stack":
        raise ValueError(
            f"Recipe: when, what and where do not go together: {type(when).__name__} decides "
            f"{'after the first block has run' if when.runs_first_block else 'by what the first block is given'}; "
            "its target is Stack()"
        )
    if when.decides_inside and not when.runs_first_block and what.guide == "residual":
        raise ValueError(
            f"Recipe: when and what do not go together: {type(when).__name__} decides before the first block runs, "
            "and guide='residual' needs it on every step; use guide='modulated' or 'input'"
        )
    if when.measures == "misfit" and what.guide != "residual":
        raise ValueError(
            "Recipe: when and what do not go together: Misfit measures how well a guide is explained; its "
            "predictor is Guided(guide='residual')"
        )
