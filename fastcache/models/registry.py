# SPDX-License-Identifier: Apache-2.0
"""Which adapter a model has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .adapter import BlockAdapter
from .table import KEEPING, MODELS, RISING

_registered: dict[str, BlockAdapter] = {}


def keeps(kwargs: dict[str, Any]) -> bool:
    """Whether a call of a model leaves something behind that later calls read."""
    for name, values in KEEPING.items():  # traced by torch.compile
        if kwargs.get(name) in values:
            return True
    return False


def may_keep(forward: Callable[..., Any]) -> bool:
    """Whether a call of a model may do so at all, by what its forward takes."""
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return True
    taken = {p.name for p in parameters.values()}
    return not taken.isdisjoint(KEEPING) or any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )


def register_adapter(model: type | str, adapter: BlockAdapter) -> None:
    """Use an adapter for a model class and its subclasses, before the built-in rows.

    Args:
        model: the class, or its name.
        adapter: how to find and drive its blocks.
    Raises:
        TypeError: `model` is no class or name, or `adapter` is no BlockAdapter.
    """
    name = model if isinstance(model, str) else getattr(model, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"register_adapter: model is {model!r}, must be a class or its name")
    if not isinstance(adapter, BlockAdapter):
        raise TypeError(
            f"register_adapter: adapter is {type(adapter).__name__}, must be a BlockAdapter"
        )
    _registered[name] = adapter


def adapter_for(model: object) -> BlockAdapter:
    """The row of the model's class or of its nearest base that has one; an empty row otherwise."""
    for base in type(model).__mro__:
        for table in (_registered, MODELS):
            if base.__name__ in table:
                return table[base.__name__]
    return BlockAdapter()


def time_rises(model: Any) -> bool:
    """Whether the timesteps of a model, or of what it wraps, are known to grow during a run."""
    return any(base.__name__ in RISING for m in model.modules() for base in type(m).__mro__)
