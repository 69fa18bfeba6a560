"""Finds in a model what a target means, or says what was looked for and what came close."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models.adapter import BlockAdapter
from ..models.attention import block_lists, list_names
from ..models.table import LIST_NAMES
from ..predictors import Guided, Predictor
from ..storage.unit import make_store
from .find import find_modules, nothing_to_hook
from .guidance import GuidanceTarget
from .guide import Guide
from .modules import ModulesTarget
from .spec import Guidance, Modules, Stack, Target
from .stack.target import StackTarget

BoundTarget = StackTarget | ModulesTarget | GuidanceTarget


class NothingToHook(ValueError):
    """A target means no module of this model."""


def bind(
    model: nn.Module,
    where: Target,
    rule: int,
    predictor: Predictor,
    start: int,
    adapter: BlockAdapter,
    control: Any,
    taken: set[int],
    dtype: torch.dtype | None = None,
) -> BoundTarget:
    """The target of one rule in one model; nothing is changed yet. Raises ValueError where nothing fits.

    taken: ids of modules that earlier rules have claimed; those found here are added. dtype: what cached
    values are kept in; None for their own.
    """
    make = functools.partial(make_store, predictor, dtype=dtype)
    if isinstance(where, Stack):
        return _stack(model, rule, predictor, start, adapter, control, make)
    if isinstance(where, Guidance):
        return GuidanceTarget(rule, model, where, control)
    assert isinstance(where, Modules)
    found = [(name, m) for name, m in find_modules(model, where, adapter) if id(m) not in taken]
    if not found:
        raise NothingToHook(nothing_to_hook(model, where))
    taken.update(id(m) for _, m in found)
    return ModulesTarget(
        rule,
        found,
        predictor,
        control,
        make,
    )


def _stack(
    model: nn.Module,
    rule: int,
    predictor: Predictor,
    start: int,
    adapter: BlockAdapter,
    control: Any,
    make: Callable,
) -> StackTarget:
    lists = block_lists(model, adapter)
    if not lists:
        raise NothingToHook(
            f"target: nothing to hook in {type(model).__name__}: looked for a non-empty ModuleList named "
            f"{', '.join(LIST_NAMES)}; found lists: {list_names(model)}. Name yours with "
            "adapter=fastcache.BlockAdapter(blocks=(...))"
        )
    count = sum(len(m) for _, m in lists)
    if count <= start:
        raise ValueError(
            f"target: {type(model).__name__} has {count} block in {[n for n, _ in lists]}; a rule that looks at "
            "the first block needs at least two"
        )
    target = StackTarget(
        rule,
        lists,
        start,
        control,
        adapter.block,
        adapter.encoder_read,
        make,
    )
    if isinstance(predictor, Guided):
        if predictor.guide == "modulated" and target.gates[0].first_io.modulation is None:
            raise ValueError(
                f"what: Guided(guide='modulated') needs the normalisation with the timestep in it of "
                f"{type(lists[0][1][0]).__name__}, and none is known; use guide='residual' or 'input', or name "
                "it with fastcache.Block(modulation=(attribute, keyword, argument))"
            )
        target.guide = Guide(predictor)
    return target
