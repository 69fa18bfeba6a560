# SPDX-License-Identifier: Apache-2.0
"""What all denoisers of one cache share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import sync
from ..ops import dispatch
from ..storage.allocate import FP8
from ..storage.budget import Budget
from ..storage.pool import Slots
from .notices import Notices
from .stats import Stats

KEPT_IN = (torch.float32, torch.float16, torch.bfloat16, FP8)

# Calibrated runs that ended, by (model, context): their ratios, one per part of the stack and step, and the steps.
Calibrated = dict[tuple[str, str], list[tuple[list[Tensor], int]]]


@dataclass(frozen=True)
class Settings:
    """Facts of a cache that never change while its denoisers are attached, and what they write into together.

    Args:
        backend: the kernels to use, see `fastcache.backends()`.
        process_group: ranks that share a sample.
        ranks: whose numbers they decide by: "sum", those of all, or "first".
        cache_dtype: what cached values are kept in; None keeps them as they are.
        budget: the bytes that cached tensors may take; None is no limit.
        timestep_callback: the running timestep, from a config.
        lock: held during a call: one at a time, whichever thread it comes from.
        stats: one record per call.
        notices: what there is to say.
        pools: the storage of every denoiser of one recipe.
        own: whether that is the cache's own recipe, and not one of single runs.
        calibrated: what calibrating runs have measured.

    Raises:
        TypeError, ValueError: that names the field.
    """

    backend: str = dispatch.AUTO
    process_group: Any = None
    ranks: str = sync.SPEAKING[0]
    cache_dtype: torch.dtype | None = None
    budget: Budget | None = None
    timestep_callback: Callable[[], Any] | None = None
    lock: Any = field(default_factory=threading.RLock)
    stats: Stats = field(default_factory=Stats)
    notices: Notices = field(default_factory=Notices)
    pools: list[Slots] = field(default_factory=list)
    own: bool = True
    calibrated: Calibrated = field(default_factory=dict)

    def __post_init__(self) -> None:
        dispatch.check_backend(self.backend)
        if self.process_group is not None and not isinstance(self.process_group, process_groups()):
            raise TypeError(
                f"process_group is {self.process_group!r}, must be a torch.distributed.ProcessGroup or None"
            )
        if self.ranks not in sync.SPEAKING:
            raise ValueError(f"ranks is {self.ranks!r}, must be one of {sync.SPEAKING}")
        dtype = self.cache_dtype
        if dtype is not None and dtype not in KEPT_IN:
            kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
            raise kind(
                f"cache_dtype is {dtype!r}, must be None or one of {', '.join(map(str, KEPT_IN))}"
            )


def process_groups() -> tuple[type, ...]:
    """The class of process groups, where this torch has one."""
    group = getattr(torch.distributed, "ProcessGroup", None)
    return () if group is None else (group,)
