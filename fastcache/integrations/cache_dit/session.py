# SPDX-License-Identifier: Apache-2.0
"""What cache-dit's `enable_cache` becomes on our runtime: a cache per transformer, driven by counted calls."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from torch import nn

from ...models.adapter import BlockAdapter
from ...recipe import Recipe
from ...runtime.frames import innermost, latest
from ..attached import Attached

SESSION = "_fastcache_session"  # what a transformer keeps
MARK = "_is_cached"  # by which cache-dit knows a transformer that is enabled
NOTED = ("_forward_pattern", "_has_separate_cfg", "_context_kwargs")  # of an adapter, by cache-dit
SHOWN = frozenset(
    (
        *(f"_{name}" for name in ("cached_steps", "accumulated_cached_steps", "residual_diffs")),
        *(f"_cfg_{n}" for n in ("cached_steps", "accumulated_cached_steps", "residual_diffs")),
        "_accumulated_executed_steps",
        "_accumulated_transformer_executed_steps",
    )
)
MAIN, CFG = "default", "cfg"  # branches by parity, where guidance comes as two calls


class Session:
    """The cache on one transformer. A call is a step, and every second one of the other branch, as with cache-dit.

    Args:
        transformer: the module.
        recipe: the rules.
        adapter: its block lists.
        kwargs: of cache-dit's context that the recipe stands for.
        lists: its block lists, which carry statistics too.
        pipe: what it is called by.
    """

    def __init__(
        self,
        transformer: nn.Module,
        recipe: Recipe,
        adapter: BlockAdapter,
        kwargs: dict[str, Any],
        lists: list[Any],
        pipe: Any = None,
    ) -> None:
        self.transformer, self.lists, self.kwargs, self.pipe = transformer, lists, kwargs, pipe
        self.attached = Attached(transformer, recipe, adapter=adapter)
        self.cache = self.attached.cache
        self.begin()
        forward = transformer.forward

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            context = self.next_step()
            with context:
                output = forward(*args, **kwargs)
            self.closed[context.name] = context
            return output

        self.attached.swaps.put(transformer, "forward", counted)
        vars(transformer)[SESSION] = self
        vars(transformer)[MARK] = True

    def begin(self) -> None:
        """The next call is a first step."""
        config = self.kwargs["cache_config"]
        self.separate, self.steps = bool(config.enable_separate_cfg), config.num_inference_steps
        self.cfg_first = bool(config.cfg_compute_first)
        self.calls, self.taken = 0, Counter[str]()
        # by branch, the context of its last call, to be opened again
        self.closed: dict[str, Any] = {}
        self.cache.reset()

    def next_step(self) -> Any:
        """The context of the call that comes: a branch that somebody has named, else one by parity."""
        around: Any = latest() and innermost(self.cache)  # mostly nothing is open
        if around is not None and around.one_call:
            name = around.name
        elif self.separate and (self.calls % 2 == 0) is self.cfg_first:
            name = CFG
        else:
            name = MAIN
        taken = self.taken
        step = taken[name]
        if step == self.steps:
            self.begin()
            taken, step = self.taken, 0
        self.calls += 1
        taken[name] = step + 1
        context = self.closed.pop(name, None)
        if context is None:  # the first one, or another thread has it open
            return self.cache.context(name, step_index=step, num_inference_steps=self.steps)
        context.step_index, context.num_inference_steps = step, self.steps
        return context

    def refresh(self, kwargs: dict[str, Any], recipe: Recipe) -> None:
        """The next call is a first step, of a run with these settings."""
        self.kwargs = kwargs
        if recipe != self.cache.recipe:
            self.cache.update(recipe)
        self.begin()

    def show(self) -> None:
        """Put statistics of the latest run where cache-dit has them: on the transformer and its block lists."""
        run = list(self.cache.stats)[-self.calls :] if self.calls else []
        second = list(self.taken)[1:2]  # cache-dit knows two branches
        found: dict[str, Any] = {}
        for prefix, cfg in (("_", False), ("_cfg_", True)):
            rows = [r for r in run if (r.context in second) is cfg]
            reused = [r.step for r in rows if r.action == "reuse"]
            found[f"{prefix}cached_steps"] = reused
            found[f"{prefix}accumulated_cached_steps"] = len(reused)
            found[f"{prefix}residual_diffs"] = {
                str(r.step): r.signal for r in rows if r.signal is not None
            }
        found["_accumulated_executed_steps"] = max(self.taken.values(), default=0)
        found["_accumulated_transformer_executed_steps"] = self.calls
        assert found.keys() == SHOWN
        for owner in (self.transformer, *self.lists):
            vars(owner).update(found)

    def close(self) -> None:
        """The transformer is as it was before."""
        self.attached.close()
        for owner in (self.transformer, *self.lists, self.pipe):
            for name in (SESSION, MARK, *NOTED, *SHOWN):
                getattr(owner, "__dict__", {}).pop(name, None)


def session_of(transformer: Any) -> Session | None:
    """The session on a transformer, if there is one."""
    found: Session | None = getattr(transformer, "__dict__", {}).get(SESSION)
    return found
