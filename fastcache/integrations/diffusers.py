# SPDX-License-Identifier: Apache-2.0
"""diffusers' own cache calls, run by fastcache.

After `install()`, `model.enable_cache(config)` and `diffusers.hooks.apply_*(model, config)` attach a
fastcache cache; `disable_cache`, `is_cache_enabled`, `cache_context` and `_reset_stateful_cache` drive it.
`fastcache.enable(pipe, config)` needs none of this.

diffusers imports `apply_*` by name inside `enable_cache`, so putting ours under these names redirects it.
A marker hook under diffusers' own hook names stands for the cache: it is what `disable_cache` removes, and
the events of diffusers' hook registry reach the cache through it. It does not touch the model's forward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import diffusers.hooks
from diffusers.hooks.hooks import HookFunctionReference, HookRegistry, ModelHook, StateManager
from torch import nn

from ..cache import Cache, enable
from ..runtime.patch import ATTACHED

# diffusers' function -> the hook names that it registers and that `disable_cache` removes (0.36 to 0.42)
HOOKS: dict[str, tuple[str, ...]] = {
    "apply_pyramid_attention_broadcast": ("pyramid_attention_broadcast",),
    "apply_faster_cache": ("faster_cache_denoiser", "faster_cache_block"),
    "apply_first_block_cache": ("fbc_leader_block_hook", "fbc_block_hook"),
    "apply_taylorseer_cache": ("taylorseer_cache",),
    "apply_mag_cache": ("mag_cache_leader_block_hook", "mag_cache_block_hook"),
    "apply_sea_cache": (
        "sea_cache_root",
        "sea_cache_leader_block",
        "sea_cache_block",
        "sea_cache_post_norm",
    ),
}
ORIGINAL = "_fastcache_original"


def install() -> None:
    """Let diffusers' cache calls run on fastcache. Calling it again does nothing.

    Call it before `from diffusers.hooks import apply_...`: a name imported earlier keeps diffusers' function.
    Models whose cache was enabled before keep that cache.
    """
    for name, hooks in HOOKS.items():
        original = getattr(diffusers.hooks, name, None)  # older versions lack some
        if original is None or hasattr(original, ORIGINAL):
            continue
        ours = _apply(original, hooks)
        for module in _homes(name, original):
            setattr(module, name, ours)


def uninstall() -> None:
    """Give diffusers its own functions back. Models that are enabled stay so until they are disabled."""
    for name in HOOKS:
        ours = getattr(diffusers.hooks, name, None)
        original = getattr(ours, ORIGINAL, None)
        if original is not None:
            for module in _homes(name, ours):
                setattr(module, name, original)


def installed() -> bool:
    """Whether `install` is in force."""
    return any(hasattr(getattr(diffusers.hooks, name, None), ORIGINAL) for name in HOOKS)


def cache_of(model: nn.Module) -> Cache:
    """The cache attached to a model, for its `summary()` and `stats`.

    Args:
        model: a model on which diffusers' calls have enabled a cache.
    Returns:
        The cache.
    Raises:
        ValueError: there is none.
    """
    denoiser = model.__dict__.get(ATTACHED)
    if denoiser is None:
        raise ValueError(f"model: no cache is enabled on this {type(model).__name__}")
    cache: Cache = denoiser.owner
    return cache


def _homes(name: str, function: Any) -> Iterator[Any]:
    """The modules of diffusers that export `function`."""
    getattr(diffusers, name, None)  # diffusers resolves its exports on first use
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "diffusers" and vars(module).get(name) is function:
            yield module


def _apply(original: Callable[..., Any], hooks: tuple[str, ...]) -> Callable[..., None]:
    @functools.wraps(original)
    def apply(module: nn.Module, config: Any) -> None:
        cache = enable(module, config)
        denoiser = module.__dict__[ATTACHED]
        registry = HookRegistry.check_if_exists_or_initialize(module)
        taken = [name for name in hooks if registry.get_hook(name) is not None]
        if taken:
            cache.disable()
            raise ValueError(
                f"target: hook {taken[0]!r} already exists; call disable_cache() first"
            )
        for name in hooks:
            _mark(registry, name, Marker(cache, denoiser, tells=name == hooks[0]))

    setattr(apply, ORIGINAL, original)
    return apply


def _mark(registry: HookRegistry, name: str, marker: Marker) -> None:
    """Enter a hook without rewriting the module's forward, which `register_hook` would."""
    reference: Any = HookFunctionReference()
    reference.pre_forward, reference.post_forward = marker.pre_forward, marker.post_forward
    # where the cache is not on the instance's forward, a hook of accelerate lies above it
    below = marker.denoiser.patch.place == "forward"
    reference.forward = marker.below if below else registry._module_ref.forward
    marker.fn_ref = reference
    registry.hooks[name] = marker
    registry._hook_order.append(name)
    registry._fn_refs.append(reference)
    if hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()


class Marker(ModelHook):
    """Stands in diffusers' registry for a cache, and takes its events.

    A model with a `cache_context` of its own gets them there; for the others the registry is the way.
    """

    _is_stateful = True

    def __init__(self, cache: Cache, denoiser: Any, tells: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.denoiser = cache, denoiser
        if tells and not hasattr(type(denoiser.model), "cache_context"):
            self.state_manager = Contexts(cache)

    def below(self, *args: Any, **kwargs: Any) -> Any:
        """What a hook registered after the cache calls once the cache is gone."""
        return self.denoiser.original(*args, **kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.cache.reset()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        denoiser = module.__dict__.get(ATTACHED, self.denoiser)
        if getattr(module.__dict__.get("forward"), "__func__", None) is Marker.below:
            # the registry has just replaced the cache's forward by `below`
            module.__dict__["forward"] = denoiser.patch.forward
        self.cache.disable()
        denoiser.patch.restore_forward()
        return module


class Contexts(StateManager):
    """Opens the cache's context when diffusers' registry announces one."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(dict)  # type: ignore[arg-type]
        self.cache = cache
        self.open: Any = None

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        if self.open is not None:
            self.open.__exit__(None, None, None)
            self.open = None
        if context is None:
            return
        names = ("step_index", "num_inference_steps", "timestep", "sigma")
        fields = {k: getattr(context, k) for k in names if getattr(context, k, None) is not None}
        name = context if isinstance(context, str) else context.name
        self.open = self.cache.context(name, **fields)
        self.open.__enter__()

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.set_context(None)
