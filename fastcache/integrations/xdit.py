# SPDX-License-Identifier: Apache-2.0
"""xDiT on fastcache: one more `cache_method`.

    from fastcache.integrations import xdit
    xdit.register()                                   # then --cache_method fastcache, or apply_cache("fastcache", ...)

Ranks hold shards of one sample; rank 0 decides for all of them, in the reduction that they meet in.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .attached import Attached
from .engine import Swaps, engine
from .from_fields import config_of

NAME = "fastcache"
HOME, APPLY = "xfuser.model_executor.cache.adapters", "apply_cache"
VERSIONS = ("0.7",)
ATTACHED = "_fastcache_xdit"  # what a transformer keeps
SWAPPED = Swaps()


def register() -> None:
    """Let xDiT's `apply_cache` take the method "fastcache", in this process. Calling it again does nothing.

    Raises:
        ImportError: xDiT is not installed, or of a version that is not known.
    Source: xDiT 0.7.0.
    """
    if SWAPPED:
        return
    original = getattr(engine(HOME, "xfuser", VERSIONS), APPLY)
    ours = _applying(original)
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "xfuser" and vars(module).get(APPLY) is original:
            SWAPPED.put(module, APPLY, ours)


def unregister() -> None:
    """Give xDiT its own function back. Transformers with a cache keep it until `remove`."""
    SWAPPED.undo()


def _applying(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply_cache(
        cache_method: str,
        num_steps: int,
        pipe: Any,
        transformer: Any = None,
        preset_kwargs: Any = None,
        cache_config: str | None = None,
        adapter_config: Any = None,
        transformer_attr: str = "transformer",
    ) -> Any:
        if cache_method != NAME:
            return original(
                cache_method,
                num_steps,
                pipe,
                transformer,
                preset_kwargs,
                cache_config,
                adapter_config,
                transformer_attr,
            )
        fields = dict(preset_kwargs) if isinstance(preset_kwargs, Mapping) else {}
        if cache_config:
            fields |= json.loads(cache_config)
        several = adapter_config if isinstance(adapter_config, list) else [adapter_config]
        targets = [
            transformer or getattr(pipe, getattr(one, "transformer_attr", transformer_attr))
            for one in several
        ]
        for target in targets:
            attach(target, fields, num_steps)
        return None if isinstance(adapter_config, list) else targets[0]

    return apply_cache


def attach(transformer: Any, fields: Mapping[str, Any], num_steps: int) -> Attached:
    """A cache on a transformer, also one that FSDP has wrapped.

    Args:
        transformer: the module.
        fields: what the cache does: `preset`, `recipe`, or fields of DBCache.
        num_steps: of a generation, a count.
    Returns:
        What was attached.
    Raises:
        TypeError, ValueError: that names what is wrong; the transformer is left as it was.
    """
    inner: nn.Module = getattr(transformer, "_fsdp_wrapped_module", transformer)
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    group = torch.distributed.group.WORLD if several else None
    attached = Attached(inner, config_of(fields, num_steps), process_group=group, ranks="first")
    vars(inner)[ATTACHED] = attached
    return attached


def remove(transformer: Any) -> None:
    """The transformer is as it was before. One without a cache stays as it is.

    Args:
        transformer: the module, or what FSDP has wrapped it in.
    """
    inner = getattr(transformer, "_fsdp_wrapped_module", transformer)
    attached = vars(inner).pop(ATTACHED, None)
    if attached is not None:
        attached.close()
