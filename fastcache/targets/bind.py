"""Binds rules to the parts of a model that they mean, or says what was looked for and what came close."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..models.adapter import BlockAdapter
from ..models.attention import block_lists, list_names
from ..models.table import LIST_NAMES
from ..policies import Policy
from ..policies.magnitude import Calibrate
from ..predictors import Guided, Predictor
from ..storage.allocate import FP8
from ..storage.unit import make_store
from .control import StepControl
from .decide import Part
from .find import find_modules, matches, nothing_to_hook
from .guidance import GuidanceTarget
from .modules import ModulesTarget
from .spec import Guidance, Modules, Stack, Target
from .stack.target import StackTarget

BoundTarget = StackTarget | ModulesTarget | GuidanceTarget


class NothingToHook(ValueError):
    """A target means no module of this model. spared: a recipe does without it where another rule fits."""

    spared = False


@dataclass
class BoundModel:
    """What the rules of a recipe mean in one model.

    control: what the running step is written into. targets: of the rules that fit, in their order, and the
    same by kind. missing: by number, why a rule was left out.
    """

    control: StepControl = field(default_factory=StepControl)
    targets: list[BoundTarget] = field(default_factory=list)
    stacks: list[StackTarget] = field(default_factory=list)
    modules: list[ModulesTarget] = field(default_factory=list)
    guidance: GuidanceTarget | None = None
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
        group: the process group whose ranks share a sample.
        dtype: what cached values are kept in; None for their own.

    Raises:
        ValueError: where nothing fits, or a rule cannot keep its values in `dtype`.
    """
    bound, taken = BoundModel(), set[int]()
    for number, rule in enumerate(rules):
        part = Part(len(bound.targets), rule.when, rule.what, bound.control, group)
        kept = kept_dtype(rule, dtype)
        try:
            bound.targets.append(_bind(bound, model, rule.where, part, adapter, taken, kept))
        except NothingToHook as error:
            if not error.spared:
                raise
            bound.missing[number] = error
    if bound.missing and not (bound.stacks or bound.modules):
        raise next(iter(bound.missing.values()))
    bound.control.hold(len(bound.targets))
    return bound


def _bind(
    bound: BoundModel,
    model: nn.Module,
    where: Target,
    part: Part,
    adapter: BlockAdapter,
    taken: set[int],
    dtype: torch.dtype | None,
) -> BoundTarget:
    """The target of one rule, also noted by its kind; that of guidance decides first and so is bound first.

    taken: ids of modules that earlier rules have claimed; those found are added.
    """
    make = functools.partial(make_store, part.what, dtype=dtype)
    if isinstance(where, Stack):
        bound.stacks.append(_stack(model, part, adapter, make))
        return bound.stacks[-1]
    if isinstance(where, Guidance):
        bound.guidance = GuidanceTarget(part, model, where)
        return bound.guidance
    assert isinstance(where, Modules)
    found = [(name, m) for name, m in find_modules(model, where, adapter) if id(m) not in taken]
    if not found:
        nothing = NothingToHook(nothing_to_hook(model, where))
        named = where.patterns is not None and any(
            matches(name, where) for name, _ in model.named_modules() if name
        )
        nothing.spared = where.fallback is not None or named
        raise nothing
    taken.update(id(m) for _, m in found)
    halved = bound.guidance is not None and getattr(part.when, "conditional_only", False)
    bound.modules.append(ModulesTarget(part, found, make, conditional_half=halved))
    return bound.modules[-1]


def _stack(model: nn.Module, part: Part, adapter: BlockAdapter, make: Any) -> StackTarget:
    lists = block_lists(model, adapter)
    if not lists:
        raise NothingToHook(
            f"target: nothing to hook in {type(model).__name__}: looked for a non-empty ModuleList named "
            f"{', '.join(LIST_NAMES)}; found lists: {list_names(model)}. Name yours with "
            "adapter=fastcache.BlockAdapter(blocks=(...))"
        )
    guide = part.what.guide if isinstance(part.what, Guided) else ""
    start = int(part.when.needs_signal or guide == "residual")
    count = sum(len(m) for _, m in lists)
    if count <= start:
        raise ValueError(
            f"target: {type(model).__name__} has {count} block in {[n for n, _ in lists]}; a rule that looks at "
            "the first block needs at least two"
        )
    target = StackTarget(part, lists, start, adapter.block, adapter.encoder_read, make)
    if guide == "modulated" and target.lists[0].first_io.modulation is None:
        raise ValueError(
            f"what: Guided(guide='modulated') needs the normalisation with the timestep in it of "
            f"{type(lists[0][1][0]).__name__}, and none is known; use guide='residual' or 'input', or name "
            "it with fastcache.Block(modulation=(attribute, keyword, argument))"
        )
    return target


def kept_dtype(rule: Bindable, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a rule's cached values are kept in. Raises ValueError where it cannot be had."""
    if dtype is None:
        return None
    refused = None
    if rule.what.table:
        refused = (
            "TaylorSeerCacheConfig keeps its factors in taylor_factors_dtype; set that instead"
        )
    elif isinstance(rule.when, Calibrate):
        refused = "a calibration measures residuals as they are; leave it out"
    elif dtype == FP8 and isinstance(rule.what, Guided):
        refused = (
            "Guided weighs values on the device, which float8 rows cannot be yet; take bfloat16"
        )
    if refused:
        raise ValueError(f"cache_dtype: {refused}")
    return dtype
