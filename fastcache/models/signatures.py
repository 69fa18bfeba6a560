# SPDX-License-Identifier: Apache-2.0
"""Names of the arguments of models and blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time")  # of a model's argument


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters after `self`; empty where the signature tells nothing."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def timed_forward(model: Any) -> Callable[..., Any]:
    """The forward that names the model's arguments: its own, or that of what a wrapper passes them on to."""
    own: Callable[..., Any] = type(model).forward
    if parameter_names(own):
        return own
    for module in model.modules():
        names = parameter_names(type(module).forward)
        if any(n in names for n in TIMESTEP_NAMES):
            named: Callable[..., Any] = type(module).forward
            return named
    return own
