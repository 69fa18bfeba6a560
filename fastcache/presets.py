"""Settings that others have published, by model family; each row names its source."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch

from .configs import CONFIGS, FLUX_MAG_RATIOS, Config

NAMED = {"FLUX_MAG_RATIOS": FLUX_MAG_RATIOS}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def presets() -> dict[str, dict[str, Any]]:
    """All rows: config, fields, the number of steps they were published for, and the source."""
    return json.loads(resources.files(__package__).joinpath("presets.json").read_text("utf-8"))


def preset(name: str, **changes: Any) -> Config:
    """The config of one row, such as "flux" or "wan/taylorseer"; `changes` replace fields.

    Raises ValueError that lists the names for an unknown one.
    """
    rows = presets()
    if name not in rows:
        raise ValueError(f"preset: name is {name!r}, must be one of {', '.join(rows)}")
    row = rows[name]
    fields = {key: _value(key, value) for key, value in row["fields"].items()}
    return CONFIGS[row["config"]](**{**fields, **changes})


def _value(key: str, value: Any) -> Any:
    """A field as the config wants it: JSON has no tuples, dtypes or functions."""
    if key == "taylor_factors_dtype":
        return DTYPES[value]
    if key.endswith("_callback"):
        return lambda module, constant=value: constant
    if key.endswith("_range") and isinstance(value, list):
        return tuple(value)
    return NAMED.get(value, value) if isinstance(value, str) else value
