# SPDX-License-Identifier: Apache-2.0
"""Who is compared step by step: fastcache, diffusers' hooks and cache-dit, and what bounds them.

An entry makes a contender with modules of its own when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import fastcache
from fastcache import FirstBlock, Guided, Mask, Recipe, Reuse, Stack, Taylor

from . import systems
from .contenders import (
    EVERY,
    FLOORS,
    OUR_KEPT,
    PASSES,
    STACK_METHODS,
    WARMUP,
    Contender,
    Passes,
    schedule,
)
from .models import FLUX, Subject

Key = tuple[str, str, str]  # system, method, what compiles it
Catalogue = dict[Key, Callable[[], Contender]]
UNCACHED: Key = ("uncached", "uncached", "")
BLOCKS = "repeated blocks"
FROZEN = "compile(frozen=True)"
CACHE_DIT = {"FirstBlock": 0, "Taylor on the stack": 1}  # orders of its own prediction


def contenders(subject: Subject, mode: str) -> Iterator[Contender]:
    """Everything that is compared on one model. mode: "eager", "compiled" or "both"."""
    if mode != "compiled":
        yield from (make() for make in eager(subject).values())
    if mode != "eager":
        yield from (make() for make in compiled(subject).values())


def eager(subject: Subject) -> Catalogue:
    """What runs as it is: nothing cached, floors, our methods, and the peers that are installed."""
    plan = schedule(len(subject.calls))
    found: Catalogue = {UNCACHED: lambda: Contender("uncached", "uncached", "", subject.twin())}
    for kept, name in FLOORS.items():
        found["uncached", name, ""] = partial(_floor, subject, kept, name)
    if subject.lists == FLUX:
        for method in ("MagCache", "FirstBlock"):
            found[PASSES, method, ""] = partial(_passes, subject, method)
    for method in our_configs(plan):
        found["fastcache", method, ""] = partial(ours, subject, method)
    if not systems.missing("diffusers"):
        for method, config in _their_configs(plan).items():
            found["diffusers", method, ""] = partial(_diffusers, subject, method, config)
    if not systems.missing("cache-dit"):
        for method, order in CACHE_DIT.items():
            found["cache-dit", method, ""] = partial(_cache_dit, subject, plan, method, order)
    return found


def compiled(subject: Subject, backend: str = "inductor") -> Catalogue:
    """The same under `backend`; peers as they compose best with it."""
    plain = eager(subject)
    found: Catalogue = {}

    def add(key: Key, how: str, compile: Callable[[Any], Any]) -> None:
        found[key[0], key[1], how] = lambda: recompiled(plain[key](), how, compile)

    own = [key for key in plain if key[0] == "fastcache" and key[1] in STACK_METHODS]
    add(UNCACHED, BLOCKS, partial(blocks_alone, backend=backend))
    for key in own:
        add(key, BLOCKS, partial(blocks_alone, backend=backend, fullgraph=True))
    for key in (key for key in plain if key[0] == "cache-dit"):
        add(key, BLOCKS, partial(blocks_alone, backend=backend))
    whole = partial(torch.compile, backend=backend)
    add(UNCACHED, "torch.compile", whole)
    for kept, name in FLOORS.items():
        how = "torch.compile"
        found["uncached", name, how] = partial(_floor, subject, kept, name, how, backend=backend)
    for key in own:
        for frozen, how in ((False, "fastcache.compile"), (True, FROZEN)):
            add(key, how, partial(fastcache.compile, frozen=frozen, backend=backend))
    for key in (key for key in plain if key[0] == "diffusers" and key[1] in STACK_METHODS):
        add(key, "torch.compile", whole)
    if torch.cuda.is_available():
        for key in own[:2]:
            add(key, "CUDA graphs", partial(fastcache.compile, mode="reduce-overhead"))
    return found


def recompiled(contender: Contender, how: str, compile: Callable[[Any], Any]) -> Contender:
    """The contender under a compiler, which `how` names in the rows."""
    contender.call, contender.compiled = compile(contender.call), how
    if how == BLOCKS:  # no floor is compiled this way
        contender.kept = None
    return contender


def blocks_alone(model: Any, **options: Any) -> Any:
    """Repeated blocks compiled; what stands around them, a cache too, runs as it is."""
    model.compile_repeated_blocks(**options)
    return model


def ours(subject: Subject, method: str) -> Contender:
    """One of our methods on a model of its own."""
    model = subject.twin()
    attached = systems.attach_fastcache(model, our_configs(schedule(len(subject.calls)))[method])
    return Contender("fastcache", method, "", model, attached, kept=OUR_KEPT.get(method))


def _passes(subject: Subject, method: str) -> Contender:
    kept = OUR_KEPT[method]
    part: Any = subject.without_blocks(kept)
    first = list(part.transformer_blocks)
    part.transformer_blocks = nn.ModuleList([Passes(*first or [None])])
    return _floor(subject, kept, method, part=part, system=PASSES)


def _floor(
    subject: Subject,
    kept: int,
    name: str,
    compiled: str = "",
    part: nn.Module | None = None,
    system: str = "uncached",
    backend: str = "inductor",
) -> Contender:
    """What a reused step of a stack cache cannot go below: the model without the blocks that it skips.

    On the schedule of the others, so that it too starts from caches that a whole step has filled.
    """
    whole = subject.twin()
    part = subject.without_blocks(kept) if part is None else part
    turn: dict[str, Any] = {"model": whole}
    if compiled:
        part = torch.compile(part, backend=backend)  # type: ignore[assignment]
    return Contender(
        system,
        name,
        compiled,
        lambda **inputs: turn["model"](**inputs),
        force=lambda compute: turn.update(model=whole if compute else part),
        kept=kept,  # against itself: what the measure cannot resolve
        part=part,
    )


def our_configs(plan: list[bool]) -> dict[str, Any]:
    steps = len(plan)
    mask = Mask(plan, warmup=0, last=False)
    forced = FirstBlock(1e9, warmup=WARMUP, max_skips=EVERY - 1)
    return {
        "MagCache": fastcache.MagCacheConfig(**_magnitude(steps), mag_ratios=[1.0] * steps),
        "FirstBlock": Recipe(forced, Reuse(), Stack()),
        "Taylor on the stack": Recipe(mask, Taylor(1), Stack()),
        "Guided": Recipe(mask, Guided(), Stack()),
        **_module_configs(fastcache),
    }


def _magnitude(steps: int) -> dict[str, Any]:
    """MagCache's fields that give the common schedule with ratios of one."""
    retention = WARMUP / steps
    return {"threshold": 1e9, "max_skip_steps": EVERY - 1, "retention_ratio": retention} | {
        "num_inference_steps": steps
    }


def _module_configs(library: Any) -> dict[str, Any]:
    """Methods on modules, as documented; see `own_plan`."""
    return {
        "TaylorSeer": library.TaylorSeerCacheConfig(
            cache_interval=EVERY,
            disable_cache_before_step=WARMUP,
            taylor_factors_dtype=torch.float32,
        ),
        "PAB": library.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=EVERY,
            spatial_attention_timestep_skip_range=(-1, 900),
            current_timestep_callback=systems.now,
        ),
        "FasterCache": library.FasterCacheConfig(
            spatial_attention_block_skip_range=EVERY,
            spatial_attention_timestep_skip_range=(-1, 900),
            is_guidance_distilled=True,
            current_timestep_callback=systems.now,
        ),
    }


def _their_configs(plan: list[bool]) -> dict[str, Any]:
    """diffusers' own."""
    from diffusers import hooks

    steps = len(plan)
    return {
        "MagCache": hooks.MagCacheConfig(**_magnitude(steps), mag_ratios=torch.ones(steps)),
        "FirstBlock": hooks.FirstBlockCacheConfig(threshold=0.0),
        **_module_configs(hooks),
    }


def _diffusers(subject: Subject, method: str, config: Any) -> Contender:
    model = subject.twin()
    attached = systems.attach_diffusers(model, config)
    force = _threshold_switch(model) if method == "FirstBlock" else None
    kept = {"FirstBlock": 1, "MagCache": 0}.get(method)
    return Contender("diffusers", method, "", model, attached, force, kept)


def _threshold_switch(model: nn.Module) -> Callable[[bool], object]:
    """diffusers' FirstBlockCache knows no schedule: move its threshold before every step."""
    hooks = [
        hook
        for module in model.modules()
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        if hasattr(hook, "threshold")
    ]

    def force(compute: bool) -> None:
        for hook in hooks:
            hook.threshold = -1.0 if compute else 1e9

    return force


def _cache_dit(subject: Subject, plan: list[bool], method: str, order: int) -> Contender:
    model = subject.twin()
    mask = [int(c) for c in plan]
    attached = systems.attach_cache_dit(
        model, order=order, steps=len(plan), warmup=WARMUP, mask=mask
    )
    return Contender("cache-dit", method, "", model, attached, kept=1)
