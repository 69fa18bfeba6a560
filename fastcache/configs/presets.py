"""Settings by name: three budgets that were measured, and what others have published by model family."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import resources
from typing import Any

import torch

from .. import policies, predictors
from ..recipe import Recipe
from .base import Config
from .mag_cache import FLUX_MAG_RATIOS
from .resolve import CONFIGS

NAMED = {"FLUX_MAG_RATIOS": FLUX_MAG_RATIOS}


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


PARTS = {"when": policies, "what": predictors}


def presets() -> dict[str, dict[str, Any]]:
    """All rows: what they set, the number of steps they were measured or published for, the source."""
    return json.loads(resources.files(__package__).joinpath("presets.json").read_text("utf-8"))


def preset(name: str, **changes: Any) -> Config | Recipe:
    """The recipe of a budget, "quality", "balanced" or "fast", or a config such as "flux" or "wan/taylorseer".

    changes replace fields: of the config, or of the recipe's policy and predictor.
    Raises ValueError that lists the names for an unknown one, TypeError for an unknown field.
    """
    rows = presets()
    if name not in rows:
        raise ValueError(f"preset: name is {name!r}, must be one of {', '.join(rows)}")
    row = rows[name]
    if "config" not in row:
        return _recipe(name, row, changes)
    given = {key: _value(key, value) for key, value in row["fields"].items()}
    return CONFIGS[row["config"]](**{**given, **changes})


def _recipe(name: str, row: dict[str, Any], changes: dict[str, Any]) -> Recipe:
    """A row's policy and predictor, each with the changes that name a field of it."""
    parts, known = {}, set()
    for part, module in PARTS.items():
        kind, given = row[part]
        made = getattr(module, kind)
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
    """A field as the config wants it: JSON has no tuples, dtypes or functions."""
    if key == "taylor_factors_dtype":
        return DTYPES[value]
    if key.endswith("_callback"):
        return lambda module, constant=value: constant
    if key.endswith("_range") and isinstance(value, list):
        return tuple(value)
    return NAMED.get(value, value) if isinstance(value, str) else value
