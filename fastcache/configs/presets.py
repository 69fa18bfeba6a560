# SPDX-License-Identifier: Apache-2.0
"""Settings by name: budgets and masks that were measured, and what others have published by model family."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import resources
from typing import Any, Literal, TypedDict, overload

import torch

from ..parts import TABLE
from ..predictors import Constant
from ..recipe import Recipe
from .base import Config
from .mag_cache import FLUX_MAG_RATIOS
from .resolve import CONFIGS

NAMED = {"FLUX_MAG_RATIOS": FLUX_MAG_RATIOS}


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Row(TypedDict, total=False):
    """One preset. A budget has `when` and `what`, (class name, fields) each; any other `config` and `fields`."""

    steps: int  # denoiser calls of the runs that it was measured or published for
    source: str  # where it was measured or published
    when: tuple[str, dict[str, Any]]
    what: tuple[str, dict[str, Any]]
    point: tuple[str, str]  # predictor and settings of the benchmark's row
    config: str
    fields: dict[str, Any]


def presets() -> dict[str, Row]:
    """All presets by name.

    Returns:
        Rows of their own, each with `steps` (denoiser calls of a run), `source`, and what it sets.
    Source: the budgets are measured on the shipped model; other rows name their publication.
    """
    rows: dict[str, Row] = json.loads(
        resources.files(__package__).joinpath("presets.json").read_text("utf-8")
    )
    return rows


@overload
def preset(name: Literal["quality", "balanced", "fast"], **changes: Any) -> Recipe: ...


@overload
def preset(name: str, **changes: Any) -> Config | Recipe: ...


def preset(name: str, **changes: Any) -> Config | Recipe:
    """Settings by name, for `fastcache.enable`.

    Args:
        name: a budget, "quality", "balanced" or "fast", a schedule for so many steps such as "converged/50" or
            "mask/8", or a model such as "flux" or "wan/taylorseer".
        changes: fields to replace: of the config, or of the recipe's policy and predictor.
    Returns:
        A recipe for a budget or a mask, a config for a model.
    Raises:
        ValueError: the name is unknown; the message lists the names.
        TypeError: a field is unknown.
    Source: `fastcache.presets()[name]["source"]`.
    """
    rows = presets()
    if name not in rows:
        raise ValueError(f"preset: name is {name!r}, must be one of {', '.join(rows)}")
    row = rows[name]
    if "config" not in row:
        return _recipe(name, row, changes)
    given = {key: _value(key, value) for key, value in row["fields"].items()}
    return CONFIGS[row["config"]](**{**given, **changes})


def _recipe(name: str, row: Row, changes: dict[str, Any]) -> Recipe:
    """A row's policy and predictor, each with the changes that name a field of it."""
    parts, known = dict[str, Any](), set[str]()
    for part in ("when", "what"):
        kind, given = row[part]
        made = TABLE[part][kind]
        own = {f.name for f in fields(made)}
        parts[part] = made(**{**given, **{k: v for k, v in changes.items() if k in own}})
        known |= own
    if unknown := changes.keys() - known:
        raise TypeError(
            f"preset: {name!r} has no field {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(known))}"
        )
    return Recipe(**parts)


def _value(key: str, value: Any) -> Any:
    """A field as the config takes it, since JSON has no tuples, dtypes or functions."""
    if key == "taylor_factors_dtype":
        return DTYPES[value]
    if key.endswith("_callback"):
        return Constant(value)
    if key.endswith("_range") and isinstance(value, list):
        return tuple(value)
    return NAMED.get(value, value) if isinstance(value, str) else value
