"""Finds in a model what a target means, or says what was looked for and what came close."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..adapters import LIST_NAMES, BlockAdapter
from ..predictors import Guided, Predictor
from ..state import make_store
from .guidance import GuidanceTarget
from .guide import Guide
from .modules import ModulesTarget
from .spec import Guidance, Modules, Stack, Target
from .stack import StackTarget

ATTENTION_CLASSES = ("Attention", "MochiAttention", "AttentionModuleMixin", "MultiheadAttention")
ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)\d*$|^(attn|attention)(_|\d|$)", re.IGNORECASE)
CROSS_NAME = re.compile(r"cross[_-]?(attn|attention)|(attn|attention)[_-]?cross", re.IGNORECASE)
SELF_NAME = re.compile(r"self[_-]?(attn|attention)", re.IGNORECASE)
TEMPORAL_NAME = re.compile(r"temporal|(^|_)temp(_|$)", re.IGNORECASE)

# Usual names of the module that maps the last hidden state to the output, best first.
OUTPUT_NAMES = (
    "proj_out",
    "proj_out_2",
    "out_layer",
    "final_layer",
    "linear_out",
    "head",
    "norm_out",
)

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
        raise NothingToHook(_nothing(model, where))
    taken.update(id(m) for _, m in found)
    return ModulesTarget(
        rule,
        found,
        predictor,
        control,
        make,
    )


# --- block lists -----------------------------------------------------------------------------------------


def block_lists(model: nn.Module, adapter: BlockAdapter) -> list[tuple[str, nn.ModuleList]]:
    """Block lists by attribute name, in the order the adapter gives or in that of registration.

    The model's own children are looked at first; where none fits, the first submodule that has some.
    """
    if adapter.blocks is not None:
        found = []
        for name in adapter.blocks:
            try:
                child = model.get_submodule(name)
            except AttributeError:
                child = None
            if not isinstance(child, nn.ModuleList) or not len(child):
                raise ValueError(
                    f"adapter: {type(model).__name__} has no block list {name!r}; its lists are {_list_names(model)}"
                )
            found.append((name, child))
        return found
    for prefix, parent in model.named_modules():
        found = [
            (f"{prefix}.{name}" if prefix else name, child)
            for name, child in parent.named_children()
            if name in LIST_NAMES and isinstance(child, nn.ModuleList) and len(child)
        ]
        if found:
            return found
    return []


def _list_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)] or [
        "none at all"
    ]


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
            f"{', '.join(LIST_NAMES)}; found lists: {_list_names(model)}. Name yours with "
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


# --- modules ---------------------------------------------------------------------------------------------


def find_modules(
    model: nn.Module, where: Modules, adapter: BlockAdapter
) -> list[tuple[str, nn.Module]]:
    """The modules that a `Modules` target means, outermost first."""
    if where.kind == "any":
        if where.fallback == "attention" and adapter.attention is not None:
            return attention_modules(model, adapter)  # a row knows better than names do
        matches = _outermost([(n, m) for n, m in model.named_modules() if n and _matches(n, where)])
        found = matches or _fallback(model, where, adapter)
    else:
        found = [
            (n, m)
            for n, m in attention_modules(model, adapter, everywhere=True)
            if _kind_fits(attention_kind(model, n, m, adapter), n, m, where)
            and (where.patterns is None or _matches(n, where))
        ]
        if not found and where.kind in ("spatial", "self"):
            found = [
                (n, m)
                for n, m in _fallback(model, where, adapter)
                if attention_kind(model, n, m, adapter) == "spatial"
            ]
    return [(n, m) for n, m in found if not any(re.search(p, n) for p in where.exclude)]


def _fallback(
    model: nn.Module, where: Modules, adapter: BlockAdapter
) -> list[tuple[str, nn.Module]]:
    """What a method's documented defaults mean on a model whose names they do not match."""
    if where.fallback == "attention":
        return attention_modules(model, adapter)
    if where.fallback == "blocks":
        return [
            (f"{name}.{i}", block)
            for name, blocks in block_lists(model, adapter)
            for i, block in blocks._modules.items()
        ]
    if where.fallback == "output":
        children = dict(model.named_children())
        return [(name, children[name]) for name in OUTPUT_NAMES if name in children][:1]
    return []


def declares_cross(name: str, module: nn.Module) -> bool:
    """Whether a module says that it attends to the text; its name is believed before its flag, which some
    classes set whenever they are given the width of their keys."""
    flag = bool(getattr(module, "is_cross_attention", False))
    return flag and not SELF_NAME.search(name.rsplit(".", 1)[-1])


def _kind_fits(kind: str, name: str, module: nn.Module, where: Modules) -> bool:
    """Defaults take exactly their kind; patterns of a user's own may also name temporal layers as spatial."""
    if where.kind == "attention" or kind == where.kind:
        return True
    if where.kind == "self":
        return not declares_cross(name, module)
    return where.fallback is None and {kind, where.kind} == {"spatial", "temporal"}


def _matches(name: str, where: Modules) -> bool:
    """Defaults that are plain words match whole path segments, so `blocks` is not `refiner_blocks`."""
    segments = name.split(".")
    for pattern in where.patterns or ():
        if where.fallback and pattern.isidentifier():
            if pattern in segments:
                return True
        elif re.fullmatch(pattern, name) if where.match == "full" else re.search(pattern, name):
            return True
    return False


def attention_modules(
    model: nn.Module, adapter: BlockAdapter, everywhere: bool = False
) -> list[tuple[str, nn.Module]]:
    """Attention modules in the block lists, or anywhere; those inside another one are left out."""
    if adapter.attention is not None:
        return _outermost(
            [
                (n, m)
                for n, m in model.named_modules()
                if any(re.search(p, n) for p in adapter.attention)
            ]
        )
    prefixes = (
        tuple(f"{name}." for name, _ in block_lists(model, adapter)) if not everywhere else ("",)
    )
    return _outermost(
        [(n, m) for n, m in model.named_modules() if n.startswith(prefixes) and is_attention(n, m)]
        if prefixes
        else []
    )


def is_attention(name: str, module: nn.Module) -> bool:
    """By class, or by the last segment of its name."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or not name:
        return False
    if any(base.__name__ in ATTENTION_CLASSES for base in type(module).__mro__):
        return True
    return (
        bool(ATTENTION_NAME.search(name.rsplit(".", 1)[-1]))
        and next(module.parameters(), None) is not None
    )


def attention_kind(model: nn.Module, name: str, module: nn.Module, adapter: BlockAdapter) -> str:
    """ "temporal", "cross" or "spatial": by adapter, by the module's own flag, by structure and name."""
    patterns = adapter.temporal
    if (
        any(re.search(p, name) for p in patterns)
        if patterns is not None
        else any(TEMPORAL_NAME.search(s) for s in name.split("."))
    ):
        return "temporal"
    flag = getattr(module, "is_cross_attention", None)
    last = name.rsplit(".", 1)[-1]
    if declares_cross(name, module) or CROSS_NAME.search(last):
        return "cross"
    if (
        last == "attn2" and flag is None
    ):  # the second attention of a block that has attn1 reads the text
        parent = model.get_submodule(name.rsplit(".", 1)[0]) if "." in name else model
        if hasattr(parent, "attn1"):
            return "cross"
    return "spatial"


def _outermost(found: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    kept: list[tuple[str, nn.Module]] = []
    for name, module in found:
        if not any(name.startswith(f"{outer}.") for outer, _ in kept):
            kept.append((name, module))
    return kept


def _nothing(model: nn.Module, where: Modules) -> str:
    looked = (
        where.patterns if where.patterns is not None else (f"the model's {where.kind} modules",)
    )
    near = near_misses(model, where.patterns or ("attn", "attention"))
    kind = "" if where.kind == "any" else f" among its {where.kind} attention modules"
    return (
        f"target: nothing to hook in {type(model).__name__}: {where.label} {list(looked)} match no module{kind}; "
        f"close by: {near or 'nothing'}"
    )


def near_misses(model: nn.Module, patterns: tuple[str, ...], limit: int = 6) -> list[str]:
    """Names of modules that share a word with the patterns, one of each shape of name."""
    words = {w.lower() for p in patterns for w in re.findall(r"[A-Za-z]{3,}", p)} | {
        "attn",
        "attention",
    }
    seen: dict[str, str] = {}
    for name, _ in model.named_modules():
        if any(w in name.lower() for w in words):
            seen.setdefault(re.sub(r"\d+", "*", name), name)
    return list(seen.values())[:limit]
