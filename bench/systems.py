# SPDX-License-Identifier: Apache-2.0
"""The systems that are compared, behind one small interface.

A system attaches one method to a model and says how a denoiser call is announced. diffusers and
cache-dit are optional: where one is missing, `missing` says so and its rows are left out.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import fastcache

CLOCK = {"t": 0.0}  # the running timestep, for methods that ask for it through a callback


def now() -> float:
    return CLOCK["t"]


@dataclass
class Attached:
    """A model with a cache on it."""

    context: Callable[..., AbstractContextManager[Any]]  # (name, step, steps, timestep)
    reset: Callable[[], object]
    detach: Callable[[], object]
    nbytes: Callable[[], int | None]
    cache: Any = None


def missing(package: str) -> str | None:
    """Why a peer is left out, or None."""
    module = package.replace("-", "_")
    return None if find_spec(module) else f"{package} is not installed: its rows are left out"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Upstream libraries warn about everything they do, and cache-dit logs every call."""
    names = ("diffusers", "cache_dit", "CACHE_DIT")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


# --- fastcache ------------------------------------------------------------------------------------------


def attach_fastcache(model: nn.Module, config: Any) -> Attached:
    cache = fastcache.enable(model, config)

    def context(
        name: str, step: int, steps: int, timestep: float | None = None, sigma: float | None = None
    ) -> AbstractContextManager[Any]:
        told = {"num_inference_steps": steps, "timestep": timestep, "sigma": sigma}
        return cache.context(name, step_index=step, **told)

    return Attached(context, cache.reset, cache.disable, cache.nbytes, cache)


# --- diffusers' hooks -----------------------------------------------------------------------------------

APPLY = {
    "FirstBlockCacheConfig": "apply_first_block_cache",
    "MagCacheConfig": "apply_mag_cache",
    "TaylorSeerCacheConfig": "apply_taylorseer_cache",
    "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
    "FasterCacheConfig": "apply_faster_cache",
}


def attach_diffusers(model: nn.Module, config: Any) -> Attached:
    """Hooks stay on the model: give this a model of its own."""
    from diffusers import hooks
    from diffusers.hooks import hooks as registry

    with quietly():
        getattr(hooks, APPLY[type(config).__name__])(model, config)

    @contextlib.contextmanager
    def context(
        name: str, step: int, steps: int, timestep: float | None = None, sigma: float | None = None
    ) -> Iterator[None]:
        registry._set_cache_context(model, registry.CacheContext(name))
        try:
            yield
        finally:
            registry._set_cache_context(model, None)

    def reset() -> None:
        found = registry.HookRegistry.check_if_exists_or_initialize(model)
        found.reset_stateful_hooks(recurse=True)

    return Attached(context, reset, lambda: None, lambda: _hook_bytes(model))


def _hook_bytes(model: nn.Module) -> int:
    """Tensors held by the states of all hooks, each counted once."""
    found: dict[int, int] = {}

    def collect(value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                collect(item, depth)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item, depth)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
            collect(vars(value), depth - 1)

    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            collect(getattr(hook, "state_manager", None), 3)
            collect(getattr(hook, "state", None), 2)
    return sum(found.values())


# --- cache-dit ------------------------------------------------------------------------------------------


def attach_cache_dit(
    model: nn.Module,
    threshold: float = 0.08,
    order: int = 0,
    steps: int = 28,
    warmup: int = 4,
    mask: list[int] | None = None,
    separate_cfg: bool = False,
) -> Attached:
    """DBCache with one block in front, on a model of its own; `mask` fixes the schedule."""
    with quietly():
        import cache_dit
        from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

        _silence(cache_dit)
        # else its own guess for the class, which is right for whole pipelines alone
        fields: dict[str, Any] = {"enable_separate_cfg": separate_cfg}
        if mask is not None:
            fields |= {"steps_computation_mask": mask, "steps_computation_policy": "static"}
        config = DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup,
            num_inference_steps=steps,
            **fields,
        )
        calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        cache_dit.enable_cache(_known(model), cache_config=config, calibrator_config=calibrator)

    def context(
        name: str, step: int, steps: int, timestep: float | None = None, sigma: float | None = None
    ) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def reset() -> None:
        with quietly():
            cache_dit.refresh_context(model, num_inference_steps=steps)

    return Attached(context, reset, lambda: None, lambda: _context_bytes(model))


def _known(model: nn.Module) -> Any:
    """cache-dit knows diffusers' classes; blocks that take text and return hidden states it is told of."""
    if type(model).__module__.startswith("diffusers"):
        return model
    from cache_dit import BlockAdapter, ForwardPattern

    return BlockAdapter(
        transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_2
    )


def _silence(cache_dit: Any) -> None:
    for name in list(logging.root.manager.loggerDict):
        if name.lower().startswith(("cache_dit", "cache-dit")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _context_bytes(model: nn.Module) -> int | None:
    """Tensors in cache-dit's context buffers."""
    manager = getattr(model, "_context_manager", None)
    contexts = getattr(manager, "_cached_context_manager", None)
    if contexts is None:
        return None
    found: dict[int, int] = {}
    for context in contexts.values():
        for value in getattr(context, "buffers", {}).values():
            if isinstance(value, torch.Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())
