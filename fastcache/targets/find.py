# SPDX-License-Identifier: Apache-2.0
"""Finding the modules that a target names."""

from __future__ import annotations

import re

from torch import nn

from ..models.adapter import BlockAdapter
from ..models.attention import (
    attention_kind,
    attention_modules,
    block_lists,
    declares_cross,
    outermost,
)
from .spec import Modules

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


def find_modules(
    model: nn.Module, where: Modules, adapter: BlockAdapter
) -> list[tuple[str, nn.Module]]:
    """The modules that a `Modules` target means, outermost first."""
    if where.kind == "any":
        if where.fallback == "attention" and adapter.attention is not None:
            return attention_modules(model, adapter)  # a row knows better than names do
        named = outermost([(n, m) for n, m in model.named_modules() if n and matches(n, where)])
        found = named or _fallback(model, where, adapter)
    else:
        found = [
            (n, m)
            for n, m in attention_modules(model, adapter, everywhere=True)
            if _kind_fits(attention_kind(model, n, m, adapter), n, m, where)
            and (where.patterns is None or matches(n, where))
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


def _kind_fits(kind: str, name: str, module: nn.Module, where: Modules) -> bool:
    """Defaults take exactly their kind; patterns of a user's own may also name temporal layers as spatial."""
    if where.kind == "attention" or kind == where.kind:
        return True
    if where.kind == "self":
        return not declares_cross(name, module)
    return where.fallback is None and {kind, where.kind} == {"spatial", "temporal"}


def matches(name: str, where: Modules) -> bool:
    """Whether a target names a module.

    Defaults that are plain words match whole path segments, so `blocks` is not `refiner_blocks`.
    """
    segments = name.split(".")
    for pattern in where.patterns or ():
        if where.fallback and pattern.isidentifier():
            if pattern in segments:
                return True
        elif re.fullmatch(pattern, name) if where.match == "full" else re.search(pattern, name):
            return True
    return False


def nothing_to_hook(model: nn.Module, where: Modules) -> str:
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
