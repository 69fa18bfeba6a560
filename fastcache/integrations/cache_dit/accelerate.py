# SPDX-License-Identifier: Apache-2.0
"""cache-dit's decisions on fastcache's kernels: its arithmetic is replaced, its bookkeeping stays.

What is replaced: `similarity` (one pass over memory in place of seven), `apply_cache` (one weighted sum, the forecast
included) and the Taylor calibrator's `update` and `approximate`. Contexts, counters, buffers and their names are
cache-dit's own, so that engines that reach into them find what they expect.

cache-dit hides its bookkeeping from torch.compile, method by method, and each of these wrappers takes longer than
what it wraps. As long as nothing is compiled in this process the methods themselves stand there; when torch is about
to trace something they are hidden again, ours too.
"""

from __future__ import annotations

import unittest.mock
from types import SimpleNamespace
from typing import Any

import torch

from ...runtime.compiling import listeners, watch_compiling
from ..engine import Swaps, engine
from . import forecast, managers

VERSIONS = ("1.5.",)
INSIDE = "cache_dit.caching"


class Methods:
    """Methods of cache-dit's classes while `accelerate` is in force: as they are, and hidden from the compiler."""

    def __init__(self) -> None:
        self.swaps = Swaps()
        self.hidden: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, ours: Any) -> None:
        """One of ours in place of a method that cache-dit hides."""
        self.swaps.put(owner, name, ours)
        self.hidden.append((owner, name, torch.compiler.disable(ours)))

    def bare(self, owner: Any) -> None:
        """The methods of a class without what hides them."""
        for name, method in list(vars(owner).items()):
            if hasattr(method, "__wrapped__") and hasattr(method, "_torchdynamo_disable"):
                self.swaps.put(owner, name, method.__wrapped__)
                self.hidden.append((owner, name, method))

    def stand_in(self, owner: Any, name: str, ours: Any) -> None:
        """One of ours in place of what the compiler has to see."""
        self.swaps.put(owner, name, ours)
        self.hidden.append((owner, name, self.swaps.kept[-1][2]))

    def graph_begins(self) -> None:
        """Something is about to be traced: what was hidden is hidden again."""
        for owner, name, method in self.hidden:
            setattr(owner, name, method)
        self.hidden.clear()

    def undo(self) -> None:
        self.hidden.clear()
        self.swaps.undo()


METHODS = Methods()


class InPlace:
    """cache-dit's blocks in place of a model's own while it runs: `mock.patch.object`, which cache-dit calls for it,
    registers them and the own ones anew, through a hundred functions."""

    def __init__(self, model: Any, name: str, blocks: Any) -> None:
        self.modules, self.name, self.blocks = model._modules, name, blocks

    def __enter__(self) -> None:
        self.own, self.modules[self.name] = self.modules[self.name], self.blocks

    def __exit__(self, *_: object) -> None:
        self.modules[self.name] = self.own


def in_place(model: Any, name: str, blocks: Any) -> Any:
    """What puts blocks in place of others around a call."""
    if name in getattr(model, "_modules", ()):
        return InPlace(model, name, blocks)
    return unittest.mock.patch.object(model, name, blocks)


def accelerate() -> None:
    """Let cache-dit run on fastcache's kernels, in this process. Calling it again does nothing.

    Decisions, statistics and buffers stay cache-dit's; tensors that no kernel takes, and steps whose input requires
    a gradient, run as before.

    Raises:
        ImportError: cache-dit is not installed, or of a version that is not known.
    Source: cache-dit 1.5.3.
    """
    if METHODS.swaps:
        return
    engine("cache_dit", "cache-dit", VERSIONS)
    adapter, base, tail, contexts, taylor = (
        engine(f"{INSIDE}.{name}", "cache-dit", VERSIONS)
        for name in (
            "cache_adapters.cache_adapter",
            "cache_blocks.pattern_base",
            "cache_blocks.pattern_3_4_5",
            "cache_contexts.cache_manager",
            "cache_contexts.calibrators.taylorseer",
        )
    )
    stack, manager = base.CachedBlocks_Pattern_Base, contexts.CachedContextManager
    state = taylor.TaylorSeerState
    theirs = SimpleNamespace(
        manager=manager,
        similarity=manager.similarity,
        can_cache=manager.can_cache,
        apply_cache=manager.apply_cache,
        residual=vars(stack)["_get_Fn_residual"],
        update=state.update,
        approximate=state.approximate,
        taylor=taylor.TaylorSeerCalibrator,
    )
    patch = SimpleNamespace(object=in_place)
    METHODS.stand_in(adapter, "unittest", SimpleNamespace(mock=SimpleNamespace(patch=patch)))
    METHODS.bare(manager)
    METHODS.bare(stack)
    METHODS.bare(tail.CachedBlocks_Pattern_3_4_5)
    theirs.can_cache = manager.can_cache
    METHODS.swaps.put(stack, "_get_Fn_residual", managers.residual(theirs))
    if (
        theirs.similarity.__module__ == contexts.__name__
    ):  # not an engine's, which sums over ranks of its own
        METHODS.put(manager, "similarity", managers.similarity(theirs))
    METHODS.put(manager, "can_cache", managers.can_cache(theirs))
    METHODS.put(manager, "apply_cache", managers.apply_cache(theirs))
    METHODS.swaps.put(state, "update", forecast.update(theirs))
    METHODS.swaps.put(state, "approximate", forecast.approximate(theirs))
    listeners.add(METHODS)
    watch_compiling()


def restore() -> None:
    """Give cache-dit its own arithmetic back. Models that are enabled go on with it."""
    METHODS.undo()
