# SPDX-License-Identifier: Apache-2.0
"""One setting of one system in a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import systems
from .systems import Attached


@dataclass(frozen=True)
class Point:
    """One measured setting. `attach` is None for the uncached model at `steps` steps."""

    system: str
    method: str
    predictor: str  # "", "reuse", "order 1", ...
    setting: str
    attach: Callable[[nn.Module], Attached] | None = None
    steps: int | None = None
    config: Any = None  # of fastcache, where it is one

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.system, self.method, self.predictor, self.setting


def ours(method: str, predictor: str, setting: str, config: Any) -> Point:
    def attach(model: nn.Module) -> Attached:
        return systems.attach_fastcache(model, config)

    return Point("fastcache", method, predictor, setting, attach, config=config)


def theirs(method: str, predictor: str, setting: str, name: str, **fields: Any) -> Point:
    def attach(model: nn.Module) -> Attached:
        from diffusers import hooks

        return systems.attach_diffusers(model, getattr(hooks, name)(**fields))

    return Point("diffusers", method, predictor, setting, attach)
