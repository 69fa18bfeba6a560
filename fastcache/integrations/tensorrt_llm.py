# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's visual generation on fastcache: its cache accelerator."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attached import Attached

NAME = "fastcache"


class FastcacheAccelerator:
    """TensorRT-LLM's `CacheAccelerator`: wrapped around transformers, refreshed before each generation.

    Args:
        config: as for `fastcache.enable`: a config, a Recipe, a preset's name or the path of a recipe file.
        options: the other arguments of `fastcache.enable`.
    Source: TensorRT-LLM's `_torch/visual_gen/cache/base.py`.
    """

    def __init__(self, config: Any = "balanced", **options: Any) -> None:
        self.config, self.options = config, options
        self.attached: Attached | None = None
        self.generation: Any = None

    def wrap(self, *transformers: nn.Module) -> None:
        """Attach a cache.

        Args:
            transformers: up to four, in the order in which they run.
        Raises:
            ValueError: it is wrapped around some already, or what else is wrong; they are left as they were.
        """
        if self.attached is not None:
            raise ValueError("transformers: fastcache is wrapped already; call unwrap() first")
        self.attached = Attached(transformers, self.config, **self.options)

    def unwrap(self) -> None:
        """The transformers are as they were before. Doing it again does nothing."""
        if self.attached is not None:
            self._end()
            self.attached.close()
        self.attached = None

    def refresh(self, num_inference_steps: int) -> None:
        """A generation begins; the last one is forgotten.

        Args:
            num_inference_steps: its steps, a count.
        """
        if self.attached is None:
            raise ValueError("transformers: fastcache is not wrapped around any; call wrap() first")
        self._end()
        self.generation = self.attached.slot(num_inference_steps)
        self.generation.resume()

    def _end(self) -> None:
        if self.generation is not None:
            self.generation.clear()
        self.generation = None

    def get_stats(self) -> dict[str, Any]:
        """Calls computed and reused, and the bytes of cached tensors now; empty where nothing is wrapped."""
        return {} if self.attached is None else dict(self.attached.statistics())

    def is_enabled(self) -> bool:
        """Whether it is wrapped around transformers, as a bool."""
        return self.attached is not None
