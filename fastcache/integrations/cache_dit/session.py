# SPDX-License-Identifier: Apache-2.0
"""What cache-dit's `enable_cache` becomes on our runtime: a cache per transformer, driven by counted calls."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...models.adapter import BlockAdapter
from ...recipe import Recipe
from ...runtime.context import Context
from ...runtime.frames import thread_request
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
        self.cache.told = self.next_call
        vars(transformer)[SESSION] = self
        vars(transformer)[MARK] = True

    def begin(self) -> None:
        """The next call is a first step."""
        config = self.kwargs["cache_config"]
        self.separate, self.steps = bool(config.enable_separate_cfg), config.num_inference_steps
        self.cfg_first = bool(config.cfg_compute_first)
        self.calls = 0
        self.latest: dict[str, Context] = {}  # what the latest call was, by branch
        self.cache.reset()

    def next_call(self, around: Any) -> Any:
        """What the call that comes is: of a branch that somebody has named, else of one by parity. One call runs at
        a time, and what says which one that is serves the next call of its branch."""
        if around is not None and around.one_call:
            name = around.name
        elif self.separate and (self.calls % 2 == 0) is self.cfg_first:
            name = CFG
        else:
            name = MAIN
        call = self.latest.get(name)
        if call is not None and call.step_index + 1 == self.steps:
            self.begin()
            call = None
        if call is None:
            call = self.latest[name] = Context(self.cache, name)
            call.step_index, call.num_inference_steps = 0, self.steps
        else:
            call.step_index += 1
        self.calls += 1
        if around is None:
            call.request, call.generation = thread_request(), None
        else:
            call.request, call.generation = around.request, around.generation
        return call

    def refresh(self, kwargs: dict[str, Any], recipe: Recipe) -> None:
        """The next call is a first step, of a run with these settings."""
        self.kwargs = kwargs
        if recipe != self.cache.recipe:
            self.cache.update(recipe)
        self.begin()

    def show(self) -> None:
        """Put statistics of the latest run where cache-dit has them: on the transformer and its block lists."""
        run = list(self.cache.stats)[-self.calls :] if self.calls else []
        second = list(self.latest)[1:2]  # cache-dit knows two branches
        found: dict[str, Any] = {}
        for prefix, cfg in (("_", False), ("_cfg_", True)):
            rows = [r for r in run if (r.context in second) is cfg]
            reused = [r.step for r in rows if r.action == "reuse"]
            found[f"{prefix}cached_steps"] = reused
            found[f"{prefix}accumulated_cached_steps"] = len(reused)
            found[f"{prefix}residual_diffs"] = {
                str(r.step): r.signal for r in rows if r.signal is not None
            }
        found["_accumulated_executed_steps"] = max(
            (call.step_index + 1 for call in self.latest.values()), default=0
        )
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
