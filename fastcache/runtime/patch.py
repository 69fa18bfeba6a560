# SPDX-License-Identifier: Apache-2.0
"""What `enable` puts on a model, and how it comes off again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from .context import Context
from .frames import Owner, request_of

ATTACHED = "_fastcache"
compiling = torch.compiler.is_compiling  # looked up once: every call asks


FIELDS = ("step_index", "num_inference_steps", "timestep", "sigma")  # of a diffusers context


_UNSET = object()


class ForwardPatch:
    """The attributes of one model that stand in for its own while a cache is attached.

    attached: what the model is marked with. owner: whose contexts the model's own ones open. entrances: what
    the model's forward becomes, in that order: called; called where torch.compile traces; called where that has
    given up; and what its reset event calls, with a request.
    """

    def __init__(
        self,
        model: nn.Module,
        attached: object,
        owner: Owner,
        entrances: tuple[Callable, Callable, Callable, Callable[[Any], None]],
    ) -> None:
        self.model, self.attached, self.owner = model, attached, owner
        self.call, self.traced, self.untraced, self.reset = entrances
        self.place, self.original = place_of(model)
        self.forward: Callable[..., Any] | None = None
        self._saved: list[tuple[str, Any]] = []

    def put_on(self) -> None:
        """What was done is undone by `take_off`, also after a failure half way."""
        model, kind = self.model, type(self.model)
        self.forward = self._forward()
        self._put(ATTACHED, self.attached)
        self._put(self.place, self.forward)
        if callable(getattr(kind, "enable_cache", None)):
            self._put("enable_cache", _enabled_already)
        if callable(getattr(kind, "cache_context", None)):
            self._put("cache_context", self._cache_context(model.cache_context))
        if callable(getattr(kind, "_reset_stateful_cache", None)):
            self._put("_reset_stateful_cache", self._reset_event(model._reset_stateful_cache))

    def take_off(self) -> None:
        attributes = self.model.__dict__
        while self._saved:
            name, before = self._saved.pop()
            if name == self.place and attributes.get(name) is not self.forward:
                self.restore_forward()
            elif before is _UNSET:
                attributes.pop(name, None)
            else:
                attributes[name] = before

    def restore_forward(self) -> None:
        """Put the model's forward back where a hook added or removed since has moved ours."""
        attributes = self.model.__dict__
        for name in ("forward", "_old_forward"):
            if attributes.get(name) is self.forward:
                attributes[name] = self.original
                if name == "forward" and getattr(self.original, "__self__", None) is self.model:
                    del attributes[name]

    def _put(self, name: str, value: Any) -> None:
        self._saved.append((name, self.model.__dict__.get(name, _UNSET)))
        self.model.__dict__[name] = value

    def _forward(self) -> Callable[..., Any]:
        original, model, attached = self.original, self.model, self.attached
        traced, untraced, patch = self.traced, self.untraced, self

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if model.__dict__.get(ATTACHED) is not attached:  # disabled, a hook still calls us
                return original(*args, **kwargs)
            if compiling():
                return traced(args, kwargs)
            if get_eval_frame_callback() in (None, False):
                return patch.call(args, kwargs)
            # torch.compile gave up on this frame: it would go on to compile our host code and the model's
            # frames one by one, so what follows runs as it is
            return torch._dynamo.run(untraced)(args, kwargs)

        return forward

    def _cache_context(self, original: Any) -> Callable:
        """The model's own cache_context, which also opens ours: pipelines drive the cache through it."""
        owner = self.owner

        @functools.wraps(original)
        @contextlib.contextmanager
        def cache_context(name: str, **fields: Any) -> Iterator[None]:
            known = {k: fields[k] for k in FIELDS if k in fields}
            with Context(owner, name, request_of(owner), **known), original(name, **fields):
                yield

        return cache_context

    def _reset_event(self, original: Any) -> Callable:
        """The model's own reset, which pipelines call at the end of a run."""
        owner, patch = self.owner, self

        @functools.wraps(original)
        def reset(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            finally:  # last, since it may warn
                patch.reset(request_of(owner))

        return reset


def refuse_enabled(models: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError where one of the models, given with their names, has a cache already."""
    for name, model in models:
        if ATTACHED in model.__dict__:
            raise ValueError(
                f"target: {name} is already enabled; call cache.update(config) to change its settings or "
                "cache.disable() first"
            )
        if getattr(model, "_cache_config", None) is not None:
            raise ValueError(
                f"target: {name} is already enabled with diffusers' own hooks; call its disable_cache() first"
            )


def place_of(model: nn.Module) -> tuple[str, Callable[..., Any]]:
    """Where the forward of a model lies that is to be replaced, and that forward; where it is, the one replaced.

    A hook of accelerate keeps the forward below it: under it, ours survives its removal.
    """
    attached = model.__dict__.get(ATTACHED)
    if attached is not None:
        return attached.patch.place, attached.original
    place = "_old_forward" if "_old_forward" in model.__dict__ else "forward"
    return place, getattr(model, place)


def _enabled_already(*args: Any, **kwargs: Any) -> None:
    """In place of a diffusers model's own `enable_cache`: two caches would each skip half of the other."""
    raise ValueError(
        "target: Caching has already been enabled with fastcache on this model; call cache.update(config) to "
        "change its settings or cache.disable() first"
    )
