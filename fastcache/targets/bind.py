# SPDX-License-Identifier: Apache-2.0
"""Binds rules to the parts of a model that they mean, or says what was looked for and what came close."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..models.adapter import BlockAdapter
from ..models.attention import block_lists, list_names
from ..models.block_io import BlockIO
from ..models.table import LIST_NAMES
from ..policies import Policy
from ..predictors import Predictor
from ..storage.allocate import FP8
from ..storage.state import State
from ..storage.together import Group, Member
from ..storage.unit import make_store
from .base import Binding, BoundTarget, NothingToHook
from .control import StepControl
from .decide import Part
from .find import find_modules, matches, nothing_to_hook
from .guidance import GuidanceTarget
from .modules import ModulesTarget
from .output import OutputTarget
from .spec import Guidance, Modules, Nothing, Stack, Target
from .stack.target import StackTarget


@dataclass
class BoundModel:
    """What the rules of a recipe mean in one model.

    control: what the running step is written into. targets: of the rules that fit, in their order. missing: by
    number, why a rule was left out.
    """

    control: StepControl = field(default_factory=StepControl)
    targets: list[BoundTarget] = field(default_factory=list)
    missing: dict[int, NothingToHook] = field(default_factory=dict)


class Bindable(Protocol):
    """A rule of a recipe."""

    @property
    def when(self) -> Policy: ...

    @property
    def what(self) -> Predictor: ...

    @property
    def where(self) -> Target: ...


def bind_rules(
    model: nn.Module,
    rules: Sequence[Bindable],
    adapter: BlockAdapter,
    group: Any = None,
    dtype: torch.dtype | None = None,
) -> BoundModel:
    """Find what each rule means in a model; nothing is changed yet.

    A documented default that fits nothing is left out where another rule of the same config fits, and so is a
    kind of attention that the model lacks, or that an earlier rule has claimed. Alone it is an error, and so are
    names of the user's that no module has.

    Args:
        model: the denoiser.
        rules: those of a recipe, in the order in which they decide.
        adapter: how the blocks of the model are found and driven.
        group: the ranks that share a sample, `sync.Ranks`.
        dtype: what cached values are kept in; None for their own.

    Raises:
        ValueError: where nothing fits, or a rule cannot keep its values in `dtype`.
    """
    bound, taken = BoundModel(), set[int]()
    for number, rule in enumerate(rules):
        part = Part(len(bound.targets), rule.when, rule.what, bound.control, group, model)
        kept = kept_dtype(rule, dtype)
        make = functools.partial(make_store, part.what, dtype=kept)
        halved = any(target.decider.halves for target in bound.targets)
        binding = Binding(part, model, adapter, make, taken, halved)
        try:
            bound.targets.append(_binder(rule.where)(binding, rule.where))
        except NothingToHook as error:
            if not error.spared:
                raise
            bound.missing[number] = error
    if bound.missing and all(target.decider.halves for target in bound.targets):
        raise next(iter(bound.missing.values()))
    bound.control.hold(len(bound.targets))
    return bound


def _modules(binding: Binding, where: Modules) -> ModulesTarget:
    model, taken = binding.model, binding.taken
    named = find_modules(model, where, binding.adapter)
    found = [(name, m) for name, m in named if id(m) not in taken]
    if not found:
        nothing = NothingToHook(nothing_to_hook(model, where))
        nothing.spared = where.fallback is not None or (
            where.patterns is not None
            and any(matches(name, where) for name, _ in model.named_modules() if name)
        )
        raise nothing
    taken.update(id(m) for _, m in found)
    halved = binding.halved and binding.part.when.conditional_only
    return ModulesTarget(binding.part, found, binding.make_store, conditional_half=halved)


def _guidance(binding: Binding, where: Guidance) -> GuidanceTarget:
    return GuidanceTarget(binding.part, binding.model, where)


class NothingTarget(BoundTarget):
    """No part of a model: there is never anything to reuse, and always all that a step needs."""

    def recorded(self, state: State) -> bool:
        return True

    def together(self, samples: Sequence[Member], head: Group | None = None) -> Group | None:
        return Group(samples, self.rule, {}, [])


def _nothing(binding: Binding, where: Nothing) -> NothingTarget:
    return NothingTarget(binding.part)


def _stack(binding: Binding, where: Stack) -> StackTarget:
    part, model, adapter = binding.part, binding.model, binding.adapter
    lists = block_lists(model, adapter)
    if not lists:
        raise NothingToHook(
            f"target: nothing to hook in {type(model).__name__}: looked for a non-empty ModuleList named "
            f"{', '.join(LIST_NAMES)}; found lists: {list_names(model)}. Name yours with "
            "adapter=fastcache.BlockAdapter(blocks=(...))"
        )
    modulated = BlockIO(lists[0][1][0], adapter.block).modulation is not None
    part = part._replace(what=part.what.on_block(modulated))
    guide = part.what.guide
    count, always = sum(len(m) for _, m in lists), where.first + where.last
    if count <= always:
        raise ValueError(
            f"target: {type(model).__name__} has {count} blocks in {[n for n, _ in lists]}, and {where} leaves none "
            "of them to skip; let fewer run always"
        )
    if count == 1 and (part.when.runs_first_block or guide == "residual"):
        raise ValueError(
            f"target: {type(model).__name__} has {count} block in {[n for n, _ in lists]}; a rule that looks at "
            "the first block needs at least two"
        )
    target = StackTarget(
        part,
        lists,
        (where.first, where.last),
        adapter.block,
        adapter.encoder_read,
        binding.make_store,
        _norm(model, adapter) if where.normed else None,
    )
    if not modulated:
        needed = "needs the normalisation with the timestep in it of"
        block, named = (
            type(lists[0][1][0]).__name__,
            "fastcache.Block(modulation=(attribute, keyword, argument))",
        )
        if guide == "modulated":
            raise ValueError(
                f"what: Guided(guide='modulated') {needed} {block}, and none is known; use guide='residual' or "
                f"'input', or name it with {named}"
            )
        if target.meter is not None and target.meter.at_input:
            raise ValueError(
                f"when: {type(part.when).__name__} {needed} {block}, and none is known; name it with {named}"
            )
    return target


def _norm(model: nn.Module, adapter: BlockAdapter) -> tuple[str, nn.Module] | None:
    """What stands right behind the blocks, by its name; None where no adapter says so."""
    if adapter.norm is None:
        return None
    found = dict(model.named_modules()).get(adapter.norm)
    if found is None:
        raise ValueError(
            f"adapter: norm is {adapter.norm!r}, and {type(model).__name__} has no such module; name the one that the "
            "image stream goes through right after the last block"
        )
    return adapter.norm, found


# What makes a target of its description, by the scope of that.
BINDERS: dict[str, Callable[[Binding, Any], BoundTarget]] = {
    "stack": _stack,
    "modules": _modules,
    "guidance": _guidance,
    "output": OutputTarget,
    "nothing": _nothing,
}


def register_target(scope: str, bind: Callable[[Binding, Any], BoundTarget]) -> None:
    """Make targets of a kind of one's own known, for this process.

    Args:
        scope: the word that the description, a subclass of `fastcache.Target`, has as its `scope`.
        bind: (binding, description) -> a `fastcache.BoundTarget`; it changes nothing in the model yet, and
            raises ValueError where the description means nothing in it.
    Raises:
        TypeError: `scope` is no string or `bind` cannot be called.
        ValueError: `scope` is that of a target of the package.
    """
    if not isinstance(scope, str) or not callable(bind):
        raise TypeError(
            f"register_target: scope is {scope!r} and bind {bind!r}, must be a string and a function of "
            "(binding, description)"
        )
    if scope in OURS:
        raise ValueError(
            f"register_target: scope is {scope!r}, which is taken; find another word than {list(OURS)}"
        )
    BINDERS[scope] = bind


OURS = tuple(BINDERS)


def _binder(where: Target) -> Callable[[Binding, Any], BoundTarget]:
    found = BINDERS.get(where.scope)
    if found is None:
        raise ValueError(
            f"where: {type(where).__name__} has the scope {where.scope!r}, and nothing binds that; call "
            f"fastcache.register_target({where.scope!r}, bind) first"
        )
    return found


def kept_dtype(rule: Bindable, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a rule's cached values are kept in. Raises ValueError where it cannot be had."""
    if dtype is None:
        return None
    refused = None
    if rule.what.table:
        refused = (
            "TaylorSeerCacheConfig keeps its factors in taylor_factors_dtype; set that instead"
        )
    elif rule.when.calibrates:
        refused = "a calibration measures residuals as they are; leave it out"
    elif dtype == FP8 and (rule.what.fitted is not None or rule.what.guide is not None):
        refused = (
            f"{type(rule.what).__name__} weighs values on the device, which float8 rows cannot be yet; take "
            "bfloat16"
        )
    if refused:
        raise ValueError(f"cache_dtype: {refused}")
    return dtype
