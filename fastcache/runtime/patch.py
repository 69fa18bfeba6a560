"""What `enable` puts on a model, and how it comes off again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

if TYPE_CHECKING:
    from .denoiser import Denoiser


MARK = "_fastcache"


FIELDS = ("step_index", "num_inference_steps", "timestep", "sigma")  # of a diffusers context


_UNSET = object()


class Shell:
    """The attributes of one model that stand in for its own while a cache is attached."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.model = denoiser, denoiser.model
        # a hook of accelerate keeps the forward below it there: under it, ours survives its removal
        self.place = "_old_forward" if "_old_forward" in self.model.__dict__ else "forward"
        self.original: Callable[..., Any] = getattr(self.model, self.place)
        self.forward: Callable[..., Any] | None = None
        self._saved: list[tuple[str, Any]] = []

    def put_on(self) -> None:
        """What was done is undone by `take_off`, also after a failure half way."""
        model, kind = self.model, type(self.model)
        self.forward = self._forward()
        self._put(MARK, self.denoiser)
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
        original, denoiser = self.original, self.denoiser

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if denoiser.model.__dict__.get(MARK) is not denoiser:  # disabled, a hook still calls us
                return original(*args, **kwargs)
            if torch.compiler.is_compiling():
                return denoiser.traced(args, kwargs)
            if get_eval_frame_callback() in (None, False):
                return denoiser.call(args, kwargs)
            # torch.compile gave up on this frame: it would go on to compile our host code and the model's
            # frames one by one, so what follows runs as it is
            return torch._dynamo.run(denoiser.untraced)(args, kwargs)

        return forward

    def _cache_context(self, original: Any) -> Callable:
        """The model's own cache_context, which also opens ours: pipelines drive the cache through it."""
        cache = self.denoiser.cache

        @functools.wraps(original)
        @contextlib.contextmanager
        def cache_context(name: str, **fields: Any) -> Iterator[None]:
            known = {k: fields[k] for k in FIELDS if k in fields}
            with cache.context(name, request=cache._request(), **known), original(name, **fields):
                yield

        return cache_context

    def _reset_event(self, original: Any) -> Callable:
        """The model's own reset, which pipelines call at the end of a run."""
        denoiser = self.denoiser

        @functools.wraps(original)
        def reset(*args: Any, **kwargs: Any) -> Any:
            denoiser.reset(denoiser.cache._request())
            result = original(*args, **kwargs)
            denoiser.cache._speak()
            return result

        return reset


def _enabled_already(*args: Any, **kwargs: Any) -> None:
    """In place of a diffusers model's own `enable_cache`: two caches would each skip half of the other."""
    raise ValueError(
        "target: Caching has already been enabled with fastcache on this model; call cache.update(config) to "
        "change its settings or cache.disable() first"
    )
