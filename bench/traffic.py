# SPDX-License-Identifier: Apache-2.0
"""What a call moves: launches, bytes, reads, and what is alive at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts launches, bytes and device reads of eager code; tensors up to `small` bytes are free.

    A schema cannot say that an op overwrites an output without reading it, so for our own ops take the
    bytes from `passes`, not from here.
    """

    def __init__(self, small: int = 4096) -> None:
        super().__init__()
        self.small, self.launches, self.bytes, self.reads = small, 0, 0, 0
        self.temporaries = 0  # bytes of new large tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = func._schema
        name = schema.name.split("::")[1]
        self.reads += name == "_local_scalar_dense"
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        moved: list[Tensor] = []
        for a in schema.arguments:
            written = a.alias_info is not None and a.alias_info.is_write
            overwritten = written and (a.kwarg_only or name in ("copy_", "fill_", "zero_"))
            times = written + (not overwritten and not name.endswith("_like"))
            moved += [t for t in tree_leaves(given.get(a.name)) if isinstance(t, Tensor)] * times
        if not func.is_view:
            results = out if isinstance(out, tuple) else (out,)
            fresh = [
                t
                for t, r in zip(results, schema.returns, strict=False)
                if r.alias_info is None and isinstance(t, Tensor)
            ]
            allocated = sum(t.nbytes for t in fresh if t.nbytes > self.small)
            self.temporaries += allocated
            if name.startswith("empty"):  # reserved, not written
                return out
            size = allocated + sum(t.nbytes for t in moved if t.nbytes > self.small)
            self.launches += size > 0
            self.bytes += size
        return out


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive at once, caches included: `now` and at the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {}  # storages alive, by address of their own

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._see((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, made=True)
        return out

    def _see(self, values: Any, made: bool) -> None:
        for t in tree_leaves(values):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes() * made
            if key not in self.seen:
                self.seen[key] = weakref.finalize(storage, self._gone, key, size)
                self.now += size
                self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self.seen.pop(key, None)
        self.now -= size
