# SPDX-License-Identifier: Apache-2.0
"""Who implements the ops: a row per backend, the reference and then the kernels, best first."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

REFERENCE = "reference"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Args:
        name: what `fastcache.backend` calls it.
        module: dotted name of a module that exports functions of `reference.py` under the same names, imported
            at the first use. It may export `available()`, True or why it does not work here, and
            `takes_dtypes(op, dtypes)`, whether its kernel of an op takes that mix.
        devices: types of devices whose tensors it can read; None: of all.
        chosen_on: types of devices on which "auto" takes it, where no row above works.
        works: True, or why it cannot be used here, asked before the module is imported; None: its module says.
    """

    name: str
    module: str
    devices: tuple[str, ...] | None = None
    chosen_on: tuple[str, ...] = ()
    works: Callable[[], bool | str] | None = None

    @cached_property
    def status(self) -> bool | str:
        """True, or the reason why it cannot run here."""
        return self.works() if self.works is not None else self._imported.available()

    @property
    def _imported(self) -> Any:
        return importlib.import_module(self.module)

    @property
    def on_gpu(self) -> bool:
        """Whether "auto" takes it on GPUs alone, where passes over memory are worth a word."""
        return self.chosen_on == ("cuda",)

    def reads(self, device: str) -> bool:
        """Whether it can run on tensors of this type of device."""
        return self.devices is None or device in self.devices

    def kernel(self, op: str) -> Callable | None:
        """Its function for an op; None where it has none."""
        return getattr(self._imported, op, None)

    def at_once(self, op: str, dtype: torch.dtype) -> tuple[Callable[..., Any], int] | None:
        """Its function for contiguous tensors of one shape and dtype that checks nothing, and the number of the dtype
        there; None where it has none."""
        found = getattr(self._imported, "at_once", None)
        return None if found is None else found(op, dtype)

    def takes(self, op: str, dtypes: Sequence[torch.dtype]) -> bool:
        """Whether its function for an op takes this mix of dtypes."""
        asked = getattr(self._imported, "takes_dtypes", None)
        return asked is None or asked(op, list(dtypes))


def _triton_works() -> bool | str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if INTERPRETED or torch.cuda.is_available():
        return True
    return "no GPU is visible (set TRITON_INTERPRET=1 before the start to run the kernels in the interpreter)"


# On each device the first row that is chosen and works there is taken, else the reference. CUDA C++ stays
# behind Triton until a GPU run shows it ahead. Triton's interpreter reads CPU tensors too.
ROWS = (
    Backend(REFERENCE, "fastcache.ops.reference", works=lambda: True),
    Backend("cpp", "fastcache.ops.backends.cpp", ("cpu",), ("cpu",)),
    Backend(
        "triton",
        "fastcache.triton_kernels",
        ("cpu", "cuda") if INTERPRETED else ("cuda",),
        ("cuda",),
        _triton_works,
    ),
    Backend("cuda", "fastcache.ops.backends.cuda", ("cuda",), ("cuda",)),
)

BACKENDS = {row.name: row for row in ROWS}
