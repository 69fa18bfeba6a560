# SPDX-License-Identifier: Apache-2.0
"""Configs, recipes and models as they are named on a command line or in JSON.

FirstBlockCacheConfig
{"config": "MagCacheConfig", "threshold": 0.12, "mag_ratios": "flux"}
{"when": {"FirstBlock": {"threshold": 0.1}}, "what": {"Taylor": {"order": 1}}, "where": "Stack"}
balanced, or another preset
settings.json, or a file that `Recipe.save` or `fastcache calibrate` wrote
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import parts, sync
from ..calibration.calibration import Calibration
from ..calibration.fields import FORMAT
from ..configs import CONFIGS, FLUX_MAG_RATIOS, Config
from ..configs.given import ENDING
from ..configs.presets import preset, presets
from ..files import FileKind
from ..recipe import Recipe

DEMO = "demo"


FILE = FileKind("config", "a text editor, `recipe.save` or `fastcache calibrate`", depth=12)


MEANT = "MODEL is `demo`, the name of a diffusers class, or module:callable"


SHORT = {
    "firstblock": "FirstBlockCacheConfig",
    "magcache": "MagCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
    "pab": "PyramidAttentionBroadcastConfig",
    "fastercache": "FasterCacheConfig",
}


def config_from(text: str) -> Config | Recipe:
    """The config or recipe that a name, a JSON text or a JSON file stands for.

    Raises ValueError that names `config` and the field.
    """
    values = _json(text)
    if isinstance(values, str):
        if values in presets():
            return preset(values)
        values = {"config": values}
    if not isinstance(values, dict):
        raise ValueError("config: must be a name or a JSON object")
    if values.get("format") == FORMAT:
        return Calibration.load(text).config()
    if values.get("format") == parts.FORMAT:
        return Recipe.load(text) if text.endswith(ENDING) else Recipe.from_dict(values)
    if "when" in values:
        return recipe_from(values)
    values = dict(values)
    name = str(values.pop("config", None))
    kind = CONFIGS.get(SHORT.get(name.lower(), name))
    if kind is None:
        raise ValueError(
            f"config: {name!r} is not one of {', '.join((*CONFIGS, *presets()))}; write a name, or JSON such as "
            '{"config": "FirstBlockCacheConfig", "threshold": 0.1}'
        )
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"config: {kind.__name__} has no field {unknown[0]!r}; it has {known}")
    try:
        return kind(**{key: _field(key, value) for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"config: {error}") from error


def recipe_from(values: dict[str, Any]) -> Recipe:
    """A recipe from {"when": ..., "what": ..., "where": ...}; each a name or {name: fields}."""
    if unknown := [key for key in values if key not in parts.BASES]:
        raise ValueError(f"config: a recipe has when, what and where, not {unknown[0]!r}")
    return Recipe(**{key: _part(key, value) for key, value in values.items()})


def _part(key: str, value: Any) -> Any:
    name, given = (value, {}) if isinstance(value, str) else _single(key, value)
    known = parts.TABLE[key]
    if name not in known:
        raise ValueError(f"config: {key} is {name!r}, must be one of {list(known)}")
    try:
        return known[name](**{field: _field(field, v) for field, v in given.items()})
    except TypeError as error:
        raise ValueError(f"config: {key}: {error}") from error


def _single(key: str, value: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(value, dict) and len(value) == 1:
        ((name, given),) = value.items()
        if isinstance(given, dict):
            return name, given
    raise ValueError(f'config: {key} must be a name or {{"name": {{fields}}}}')


def _field(name: str, value: Any) -> Any:
    """What JSON cannot say: tuples, dtypes, and ratios by name or file."""
    if name in ("taylor_factors_dtype", "dtype") and isinstance(value, str):
        return parts.dtype_named(value)
    if name == "mag_ratios" and isinstance(value, str):
        return FLUX_MAG_RATIOS if value == "flux" else Calibration.load(value).mag_ratios
    return tuple(value) if isinstance(value, list) else value


def _json(text: str) -> Any:
    """The value of a JSON text or file; any other text is a name."""
    if text.endswith(ENDING):
        return FILE.load(Path(text), dict)
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config: not JSON ({type(error).__name__})") from error


def object_from(text: str) -> Any:
    """What `module:name` or the name of a diffusers class stands for."""
    module, _, name = text.rpartition(":")
    try:
        found = importlib.import_module(module or "diffusers")
    except ImportError as error:
        raise ValueError(
            f"model: cannot import {module or 'diffusers'}: {error}; {MEANT}"
        ) from error
    if not hasattr(found, name):
        raise ValueError(f"model: {module or 'diffusers'} has no {name!r}; {MEANT}")
    return getattr(found, name)


def made_by(command: str, name: str, what: str) -> tuple[Any, Callable[..., Any]]:
    """The pair of target and one generation that module:callable returns; `what` names the generation."""
    if ":" not in name:
        raise ValueError(
            f"{command}: model is {name!r}, must be `demo` or module:callable that returns (target, {what}), "
            f"{what} being one generation"
        )
    return pair(command, name, object_from(name)(), what)


def pair(command: str, name: str, made: Any, what: str) -> tuple[Any, Callable[..., Any]]:
    """A target and one generation with it. Raises ValueError where `made` is something else."""
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[1]):
        raise ValueError(f"{command}: {name} must return (target, {what}), {what} one generation")
    return made


def written(text: str, config: Config | Recipe) -> str:
    """How a config that was named on a command line is written in a program."""
    kind = CONFIGS.get(type(config).__name__)
    if text.endswith(ENDING):
        form = _json(text).get("format")
        if form == FORMAT:
            return f"fastcache.Calibration.load({json.dumps(text)}).config()"
        if form == parts.FORMAT:
            return json.dumps(text)
    if text in presets():
        return json.dumps(text)
    if kind is None:
        return f"fastcache.Recipe.from_dict({config.to_dict()!r})"  # type: ignore[union-attr]
    values = vars(config)
    given = [
        f"{f.name}={_spelled(values[f.name])}"
        for f in fields(kind)  # type: ignore[arg-type]
        if values[f.name] != (f.default if f.default is not MISSING else None)
    ]
    return f"fastcache.{kind.__name__}({', '.join(given)})"


def _spelled(value: Any) -> str:
    return repr(sync.numbers([value]) if isinstance(value, torch.Tensor) else value)


def model_from(text: str, init: dict[str, Any] | None = None) -> Any:
    """A model to look at: the demo's, a diffusers class without weights, or what a callable gives.

    init: keywords of the class or callable. A diffusers class is built on the meta device.
    """
    if text == DEMO:
        from ..demo.model import load_model

        return load_model()
    found = object_from(text)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ValueError(f"model: {text} is {type(found).__name__}; {MEANT}")
    init = {k: tuple(v) if isinstance(v, list) else v for k, v in (init or {}).items()}
    if ":" in text:
        return found(**init)
    with torch.device("meta"):
        return found(**init).eval()
