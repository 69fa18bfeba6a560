# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni on fastcache: a plugin that makes `cache_backend="fastcache"` one of its backends.

`pip install` is all there is to do: vLLM-Omni runs `register` in each of its processes, by the entry point group
`vllm_omni.general_plugins`. Its selector is then asked for the other names only. What the cache does is said by
`cache_config`, a dict with one of `preset`, `recipe` (a path) or fields of DBCache.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..models.pipeline import DENOISERS
from ..runtime.notices import warn
from .attached import Attached, Slot
from .engine import Swaps, engine
from .from_fields import config_of, needs_steps

NAME = "fastcache"
VERSIONS = ("0.30", "0.31")
SELECTOR, SELECT = "vllm_omni.diffusion.cache.selector", "get_cache_backend"
SWAPPED = Swaps()


def register() -> None:
    """Let vLLM-Omni select fastcache by name, in this process. Calling it again does nothing.

    Installed beside a version that is not known it changes nothing for other backends: asking for this one raises, and
    where there is nothing to select by a warning says so.

    Raises:
        ImportError: vLLM-Omni is not installed.
    Source: vLLM-Omni 0.30.
    """
    if SWAPPED:
        return
    engine("vllm_omni", "vllm-omni", ("",))
    try:
        original = getattr(engine(SELECTOR, "vllm-omni", ("",)), SELECT)
    except (
        ImportError,
        AttributeError,
    ) as error:  # who runs this may not have asked for fastcache at all
        warn(f"fastcache: this vLLM-Omni has no {SELECTOR}.{SELECT}, and cannot select it: {error}")
        return
    ours = _selecting(original)
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "vllm_omni" and vars(module).get(SELECT) is original:
            SWAPPED.put(module, SELECT, ours)


def unregister() -> None:
    """Give vLLM-Omni its own selector back."""
    SWAPPED.undo()


def _selecting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        if cache_backend != NAME:
            return original(cache_backend, cache_config)
        engine(SELECTOR, "vllm-omni", VERSIONS)
        base = engine("vllm_omni.diffusion.cache.base", "vllm-omni", VERSIONS)
        base.CacheBackend.register(FastcacheBackend)  # an abstract base class
        return FastcacheBackend(cache_config)

    return get_cache_backend


class FastcacheBackend:
    """vLLM-Omni's `CacheBackend`: enabled once, after its blocks were compiled, refreshed per admitted batch.

    Args:
        config: a dict, its JSON, or vLLM-Omni's config object, of which the fields that differ from its defaults count.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.enabled = config, False
        self.fields = fields_of(config)
        self.attached: Attached | None = None

    def enable(self, pipeline: Any) -> None:
        """Attach a cache to the denoisers of a pipeline; each call of its `forward` is one generation.

        Args:
            pipeline: of vLLM-Omni.
        Raises:
            ValueError, TypeError: that names what is wrong; the pipeline is left as it was.
        """
        if self.attached is not None:
            raise ValueError("pipeline: fastcache is enabled already; make another backend")
        self.attached = Attached(denoisers_of(pipeline), config_of(self.fields))
        self.attached.announce(pipeline, "forward")
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """A batch was admitted: the next generation has so many steps.

        Args:
            pipeline: of vLLM-Omni.
            num_inference_steps: a count; 0 where it is not known.
            verbose: taken and not needed.
        """
        assert self.attached is not None
        steps = num_inference_steps or None
        config = config_of(self.fields, steps) if needs_steps(self.fields) else None
        self.attached.refresh(steps, config)

    def is_enabled(self) -> bool:
        """Whether the cache is attached, as a bool."""
        return self.enabled

    def disable(self) -> None:
        """The pipeline is as it was before `enable`."""
        if self.attached is not None:
            self.attached.close()
        self.attached, self.enabled = None, False


class SlotDriver:
    """vLLM-Omni's `DiTCacheStateDriverBase`: many requests in flight, a slot for each.

    Args:
        backend: the backend, enabled.
    """

    backend_name = NAME

    def __init__(self, backend: FastcacheBackend) -> None:
        if backend.attached is None:
            raise ValueError("backend: fastcache is not enabled on a pipeline yet")
        self.attached = backend.attached

    def create_empty_slot(self) -> Slot:
        """A slot in which nothing ran yet."""
        return self.attached.slot()

    def initialize_fresh_slot(self, slot: Slot, num_inference_steps: int) -> None:
        """A request of so many steps begins in a slot; what the last one left there is forgotten."""
        slot.clear()
        slot.begin(num_inference_steps)

    def install_slot(self, slot: Slot) -> None:
        """The calls that follow are of this slot's request."""
        slot.resume()

    def deactivate_slot(self, slot: Slot) -> None:
        """The calls that follow are not; what it holds stays."""
        slot.pause()

    def clear_slot(self, slot: Slot) -> None:
        """The request is over: its storage serves the next ones."""
        slot.clear()

    def is_slot_compatible(self, slot: Slot) -> bool:
        """Whether a slot is one of this backend's denoisers, as a bool."""
        return slot.attached is self.attached

    def estimate_slot_bytes(self, slot: Slot) -> int:
        """Bytes of cached tensors that a slot holds now."""
        return slot.nbytes()


def denoisers_of(pipeline: Any) -> list[nn.Module]:
    """The denoisers of a pipeline: what it names itself in `_dit_modules`, else those under the usual names."""
    names = getattr(pipeline, "_dit_modules", None) or DENOISERS
    found = [_at(pipeline, name) for name in names]
    unwrapped = [getattr(module, "_orig_mod", module) for module in found]
    modules = [module for module in unwrapped if isinstance(module, nn.Module)]
    if not modules:
        raise ValueError(
            f"pipeline: {type(pipeline).__name__} has no denoiser under {tuple(names)}"
        )
    return list(dict.fromkeys(modules))


def _at(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def fields_of(config: Any) -> Mapping[str, Any]:
    """What a user has set: a dict as it is, and of the engine's object what differs from its defaults."""
    if config is None:
        return {}
    if isinstance(config, str):
        config = json.loads(config)
    if isinstance(config, Mapping):
        return config
    plain = vars(type(config)())
    changed = {k: v for k, v in vars(config).items() if not k.startswith("_") and v != plain.get(k)}
    extra = vars(config).get("_extra_params") or {}
    return {**changed, **extra}
