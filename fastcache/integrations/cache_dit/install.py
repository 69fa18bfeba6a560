# SPDX-License-Identifier: Apache-2.0
"""cache-dit's own calls, run by fastcache: `enable_cache`, `refresh_context`, `disable_cache` and `summary`.

They all go through one class of cache-dit's, whose three methods are replaced; its registry of models, block adapters,
patterns, configs and summaries stay. What has no counterpart here runs in cache-dit itself, and a warning says so.
"""

from __future__ import annotations

import functools
import sys
import weakref
from types import SimpleNamespace
from typing import Any

from ...runtime.notices import warn
from ..engine import Swaps, engine
from .accelerate import INSIDE, VERSIONS, restore
from .session import Session, session_of
from .settings import Elsewhere, adapter_of, recipe_of

SWAPPED = Swaps()
MODIFY, CONTEXT = "_modify_context_params", "_context_kwargs"  # names of cache-dit's
SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()


def install() -> None:
    """Let cache-dit's calls run on fastcache, in this process. Calling it again does nothing.

    Models that were enabled before keep cache-dit's own cache. What engines reach for inside of cache-dit, its context
    managers and their buffers, is not there; such engines want `accelerate`.

    Raises:
        ImportError: cache-dit is not installed, or of a version that is not known.
    Source: cache-dit 1.5.3.
    """
    if SWAPPED:
        return
    top = engine("cache_dit", "cache-dit", VERSIONS)
    inside = engine(f"{INSIDE}.cache_adapters", "cache-dit", VERSIONS)
    adapters = engine(f"{INSIDE}.block_adapters", "cache-dit", VERSIONS)
    cached = inside.CachedAdapter
    theirs = SimpleNamespace(
        adapter=adapters.BlockAdapter,
        cachify=cached.cachify,
        refresh=cached.maybe_refresh_context,
        release=cached.maybe_release_hooks,
        summary=top.summary,
    )
    SWAPPED.put(cached, "cachify", classmethod(_cachify(theirs)))
    SWAPPED.put(cached, "maybe_refresh_context", classmethod(_refresh(theirs)))
    SWAPPED.put(cached, "maybe_release_hooks", classmethod(_release(theirs)))
    shown = _summary(theirs)
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "cache_dit" and vars(module).get("summary") is theirs.summary:
            SWAPPED.put(module, "summary", shown)


def uninstall() -> None:
    """Give cache-dit its own functions back, and models what they were before they were enabled."""
    for session in list(SESSIONS):
        session.close()
        SESSIONS.discard(session)
    SWAPPED.undo()
    restore()


def _cachify(theirs: Any) -> Any:
    @functools.wraps(theirs.cachify.__func__)
    def cachify(cls: Any, block_adapter: Any, **context_kwargs: Any) -> Any:
        if block_adapter.auto:
            block_adapter = theirs.adapter.auto_block_adapter(block_adapter)
        if not theirs.adapter.check_block_adapter(block_adapter):
            return block_adapter
        block_adapter = theirs.adapter.normalize(block_adapter)
        if theirs.adapter.is_cached(block_adapter.transformer):
            return block_adapter
        context_kwargs = cls.check_context_kwargs(block_adapter, **context_kwargs)
        _, contexts = cls.modify_context_params(block_adapter, **context_kwargs)
        made: list[Session] = []
        try:
            rows = iter(contexts)
            for number, transformer in enumerate(block_adapter.transformer):
                own = [next(rows) for _ in block_adapter.blocks[number]]
                made.append(_session(block_adapter, number, transformer, own))
        except Elsewhere as reason:
            for session in made:
                session.close()
            warn(
                f"fastcache: {reason} has no counterpart here; {type(block_adapter.pipe).__name__} runs on "
                "cache-dit's own cache"
            )
            return theirs.cachify(block_adapter, **context_kwargs)
        except BaseException:
            for session in made:
                session.close()
            raise
        SESSIONS.update(made)
        cls.apply_params_hooks(block_adapter, contexts)
        _announce(block_adapter.pipe, made)
        return block_adapter

    return cachify


def _session(
    block_adapter: Any, number: int, transformer: Any, own: list[dict[str, Any]]
) -> Session:
    """The session on one transformer of an adapter."""
    recipes = [recipe_of(kwargs) for kwargs in own]
    if any(recipe != recipes[0] for recipe in recipes):
        raise Elsewhere("params_modifiers that set block lists of one transformer apart")
    joined = block_adapter.dummy_blocks_names
    dummies = joined[number] if joined and isinstance(joined[0], list) else joined
    names = [*block_adapter.blocks_name[number], *(dummies or ())]
    lists = list(block_adapter.blocks[number])
    adapter = adapter_of(transformer, names, lists, block_adapter.forward_pattern[number])
    return Session(transformer, recipes[0], adapter, own[0], lists, block_adapter.pipe)


def _announce(pipe: Any, made: list[Session]) -> None:
    """Have each call of a pipeline begin anew, as cache-dit does; one without a call is driven by its transformer."""
    base = type(pipe)
    if not callable(pipe):
        return

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        for session in made:
            session.begin()
        outputs = base.__call__(self, *args, **kwargs)
        for session in made:
            session.show()
        return outputs

    functools.update_wrapper(__call__, base.__call__)
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    kind = type(base.__name__, (base,), {"__call__": __call__, **named})
    made[0].attached.swaps.kept.append((pipe, "__class__", base))
    pipe.__class__ = kind


def _refresh(theirs: Any) -> Any:
    @functools.wraps(theirs.refresh.__func__)
    def maybe_refresh_context(cls: Any, transformer: Any, **forced: Any) -> None:
        session = session_of(transformer)
        if session is None:
            theirs.refresh(transformer, **forced)
            return
        forced.pop("verbose", None)
        kwargs = getattr(cls, MODIFY)(forced, session.kwargs) if forced else session.kwargs
        session.refresh(kwargs, recipe_of(kwargs))
        vars(transformer)[CONTEXT] = kwargs

    return maybe_refresh_context


def _release(theirs: Any) -> Any:
    @functools.wraps(theirs.release.__func__)
    def maybe_release_hooks(cls: Any, pipe_or_adapter: Any) -> None:
        for session in _sessions_of(pipe_or_adapter):
            session.close()
            SESSIONS.discard(session)
        theirs.release(pipe_or_adapter)

    return maybe_release_hooks


def _sessions_of(owner: Any) -> list[Session]:
    """The sessions on a transformer, on those of a pipeline, or on those of a block adapter."""
    held = [owner]
    for name in ("transformer", "transformer_2"):
        found = getattr(owner, name, None)
        held += found if isinstance(found, list) else [found]
    sessions = (session_of(transformer) for transformer in held)
    return list(dict.fromkeys(s for s in sessions if s is not None))


def _summary(theirs: Any) -> Any:
    @functools.wraps(theirs.summary)
    def summary(adapter_or_others: Any, *args: Any, **kwargs: Any) -> Any:
        for session in _sessions_of(adapter_or_others):
            session.show()
        return theirs.summary(adapter_or_others, *args, **kwargs)

    return summary
