# SPDX-License-Identifier: Apache-2.0
"""What could go wrong with a cache on a model: one function per thing that is looked at, a row each in `LOOKS`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cache import Cache
from ..models.attention import block_lists
from ..models.block_io import BlockIO
from ..ops import dispatch
from ..ops.backends.table import BACKENDS
from ..runtime.denoiser import Denoiser

ERROR, WARNING, NOTE = "error", "warning", "note"
PLAIN = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read


@dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    Args:
        level: "error" where nothing will be cached, "warning" where it may go wrong, "note" to know of.
        what: it, in words.
        do: what to do about it, "" for nothing.
    """

    level: str
    what: str
    do: str = ""


def device_of(model: nn.Module) -> str:
    """Kind of the device that the weights lie on."""
    return next((p.device.type for p in model.parameters()), "cpu")


def own_call(target: Any) -> Callable[..., Any] | None:
    """What a pipeline does when it is called; None where it cannot be."""
    return inspect.unwrap(type(target).__call__) if callable(target) else None


def _contexts(target: Any, cache: Cache) -> Iterator[Finding]:
    """Whether calls say whose branch they are, and runs where they begin."""
    if isinstance(target, nn.Module):
        return
    call = own_call(target)
    if call is None:
        yield Finding(
            WARNING,
            f"{type(target).__name__} cannot be called, so it does not say where a generation begins",
            "open `with cache.run(num_inference_steps=...):` around each",
        )
        return
    try:
        source = inspect.getsource(call)
    except (OSError, TypeError):
        return
    if "cache_context(" not in source:
        yield Finding(
            NOTE,
            f"{type(target).__name__} opens no contexts: branches of guidance are told apart by what they are given",
            'where the summary counts them wrongly, open `with cache.context("cond"):` around each call',
        )


def _compiled(target: Any, cache: Cache) -> Iterator[Finding]:
    for name, model in cache.models:
        whole = target if isinstance(target, nn.Module) else getattr(target, name)
        if whole is not model or model._compiled_call_impl is not None:
            if cache.recipe.needs_signal:
                yield Finding(
                    WARNING,
                    f"{name} is compiled already, and this method decides by what it sees in a call: it runs "
                    "uncompiled, or raises with fullgraph=True",
                    "leave torch.compile away and call fastcache.compile(model) after enable",
                )
            else:
                yield Finding(
                    NOTE,
                    f"{name} is compiled already: each call needs an open context, in which its step is decided",
                    "call fastcache.compile(model) after enable in its place, which needs none",
                )
        inside = [m for m in model.modules() if m is not model and m._compiled_call_impl]
        if inside:
            yield Finding(
                NOTE, f"{len(inside)} modules of {name} are compiled: they stay so, and skip alike"
            )


def _offloaded(target: Any, cache: Cache) -> Iterator[Finding]:
    for name, model in cache.models:
        if any("_hf_hook" in vars(m) for m in model.modules()):
            yield Finding(
                NOTE,
                f"{name} is offloaded by accelerate: weights of skipped blocks stay where they are, what is cached "
                "stays on the device",
                "fastcache.enable(..., max_bytes=...) bounds what that takes",
            )
        found = (vars(m).get("_diffusers_hook") for m in model.modules())
        if hooks := sorted({name for registry in found if registry for name in registry.hooks}):
            yield Finding(NOTE, f"{name} has hooks of diffusers: {', '.join(hooks)}")


def _ranks(target: Any, cache: Cache) -> Iterator[Finding]:
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if running else _told("WORLD_SIZE")
    if ranks <= 1:
        return
    if cache.recipe.needs_signal:
        yield Finding(
            WARNING,
            f"{ranks} ranks: each decides by its own numbers, and ranks that share a sample may then wait forever",
            "pass their group: fastcache.enable(..., process_group=group)",
        )
    else:
        yield Finding(NOTE, f"{ranks} ranks: this method's schedule is the same on all of them")


def _told(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 1


def _weights(target: Any, cache: Cache) -> Iterator[Finding]:
    """Mode, gradients, types and place of the weights."""
    for name, model in cache.models:
        if model.training:
            yield Finding(
                WARNING,
                f"{name} is in training mode: calls with gradients are refused, and dropout is not cached",
                "call model.eval()",
            )
        if isinstance(target, nn.Module) and any(p.requires_grad for p in model.parameters()):
            yield Finding(
                NOTE,
                "its weights require gradients, and a reused step has none",
                "sample under torch.no_grad()",
            )
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        for kind in sorted(map(str, kinds - set(PLAIN) - {torch.float8_e4m3fn, torch.float8_e5m2})):
            yield Finding(
                NOTE, f"{name} has weights in {kind}: no kernel reads that, the reference runs"
            )
        if device_of(model) == "meta":
            yield Finding(NOTE, f"{name} has no weights here (meta device): nothing can be run")


def _kernels(target: Any, cache: Cache) -> Iterator[Finding]:
    for device in sorted({device_of(model) for _, model in cache.models} - {"meta"}):
        if dispatch.active(device) == "reference":
            off = [
                f"{name}: {why}"
                for name, why in dispatch.backends().items()
                if why is not True and device in BACKENDS[name].chosen_on
            ]
            yield Finding(
                WARNING,
                f"no kernels on {device}, so the cache's own arithmetic is slow: {'; '.join(off) or 'there are none'}",
                "see `fastcache info`",
            )


def _blocks(target: Any, cache: Cache) -> Iterator[Finding]:
    """What is not known of blocks, and therefore learnt or assumed."""
    for denoiser in cache.denoisers:
        if denoiser.recipe.where.scope == "stack":
            yield from _unknown(denoiser)


def _unknown(denoiser: Denoiser) -> Iterator[Finding]:
    row, seen = denoiser.adapter.block, set[type]()
    lists = block_lists(denoiser.model, denoiser.adapter)
    for name, blocks in lists:
        first = blocks[0]
        if type(first) in seen:
            continue
        seen.add(type(first))
        io = BlockIO(first, row)
        if io.returns is None and io.modulation is None:
            took = f"takes {io.hidden!r} for the hidden states" if io.names else "names no argument"
            yield Finding(
                NOTE,
                f"{io.name} in {name} is not a class that is known: it {took}, and what it returns is learnt in "
                "the first computed call",
                "where it returns text and image, BlockAdapter(block=Block(returns=(...))) says which is which",
            )
    if lists and denoiser.recipe.what.guide == "auto":
        io = BlockIO(lists[0][1][0], row)
        if io.modulation is None:
            yield Finding(
                NOTE,
                f"it is not known how {io.name} brings the timestep in, so the forecast follows its first block's "
                "residual, and that block runs on every step",
                "BlockAdapter(block=Block(modulation=...)) says how",
            )


def _adapters(target: Any, cache: Cache) -> Iterator[Finding]:
    for name, model in cache.models:
        if "peft_config" in vars(model):
            yield Finding(
                NOTE, f"{name} has LoRA adapters", "call cache.reset() after switching them"
            )


# What is looked at, in the order in which it is told.
LOOKS: tuple[Callable[[Any, Cache], Iterator[Finding]], ...] = (
    _contexts,
    _compiled,
    _ranks,
    _weights,
    _kernels,
    _offloaded,
    _blocks,
    _adapters,
)
