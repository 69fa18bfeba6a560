# SPDX-License-Identifier: Apache-2.0
"""Attention modules and block lists of a model, by class and by name."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from .adapter import BlockAdapter
from .table import LIST_NAMES

ATTENTION_CLASSES = ("Attention", "MochiAttention", "AttentionModuleMixin", "MultiheadAttention")


ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)\d*$|^(attn|attention)(_|\d|$)", re.IGNORECASE)


CROSS_NAME = re.compile(r"cross[_-]?(attn|attention)|(attn|attention)[_-]?cross", re.IGNORECASE)


SELF_NAME = re.compile(r"self[_-]?(attn|attention)", re.IGNORECASE)


TEMPORAL_NAME = re.compile(r"temporal|(^|_)temp(_|$)", re.IGNORECASE)


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
                    f"adapter: {type(model).__name__} has no block list {name!r}; its lists are {list_names(model)}"
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


def list_names(model: nn.Module) -> list[str]:
    """Names of all module lists, for messages."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)] or [
        "none at all"
    ]


def declares_cross(name: str, module: nn.Module) -> bool:
    """Whether a module says that it attends to the text.

    A name such as `self_attn` outweighs the flag, which some classes set whenever they are given the
    width of their keys.
    """
    flag = bool(getattr(module, "is_cross_attention", False))
    return flag and not SELF_NAME.search(name.rsplit(".", 1)[-1])


def attention_modules(
    model: nn.Module, adapter: BlockAdapter, everywhere: bool = False
) -> list[tuple[str, nn.Module]]:
    """Attention modules in the block lists, or anywhere; those inside another one are left out."""
    if adapter.attention is not None:
        return outermost(
            [
                (n, m)
                for n, m in model.named_modules()
                if any(re.search(p, n) for p in adapter.attention)
            ]
        )
    prefixes = (
        tuple(f"{name}." for name, _ in block_lists(model, adapter)) if not everywhere else ("",)
    )
    return outermost(
        [(n, m) for n, m in model.named_modules() if n.startswith(prefixes) and is_attention(n, m)]
        if prefixes
        else []
    )


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether a module is attention: by its class, or by the last segment of its name."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or not name:
        return False
    if any(base.__name__ in ATTENTION_CLASSES for base in type(module).__mro__):
        return True
    return (
        bool(ATTENTION_NAME.search(name.rsplit(".", 1)[-1]))
        and next(module.parameters(), None) is not None
    )


def attention_kind(
    model: nn.Module, name: str, module: nn.Module, adapter: BlockAdapter
) -> Literal["temporal", "cross", "spatial"]:
    """The kind of an attention module: by the adapter, its own flag, the structure around it and its name."""
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
    # the second attention of a block that has attn1 reads the text
    if last == "attn2" and flag is None:
        parent = model.get_submodule(name.rsplit(".", 1)[0]) if "." in name else model
        if hasattr(parent, "attn1"):
            return "cross"
    return "spatial"


def outermost(found: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The modules that lie in none of the others."""
    kept: list[tuple[str, nn.Module]] = []
    for name, module in found:
        if not any(name.startswith(f"{outer}.") for outer, _ in kept):
            kept.append((name, module))
    return kept
