# SPDX-License-Identifier: Apache-2.0
"""What every launch needs on the host: where samples begin, and block sizes.

Tensors are seen as S samples of n dense elements. Contiguous ones are one sample whatever their
rank; a token range of [B, T, C] is B samples whose distance is the batch stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
# (limit, value) rows: the first row whose limit is not exceeded counts; the last limit is None.
Table = tuple[tuple[int | None, T], ...]

# Columns per tile of a kernel that works on rows, by row width.
COLUMNS: Table[int] = ((64, 64), (128, 128), (256, 256), (512, 512), (None, 1024))
# Of every kernel: 4096 elements of 16 bits are then two 16-byte loads per thread and tensor.
WARPS = 8


def pick(table: Table[T], size: int) -> T:
    """The value of the first row of `table` that covers `size`."""
    return next(value for limit, value in table if limit is None or size <= limit)


def cdiv(n: int, size: int) -> int:
    """ceil(n / size), without the microseconds that triton.cdiv takes on the host."""
    return -(-n // size)


def row_tile(width: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of a tile of `elements` for rows of `width`."""
    columns = pick(COLUMNS, width)
    return elements // columns, columns


def samples(
    tensors: Sequence[Tensor | None], per_sample: bool = False
) -> tuple[int, int, tuple[int, ...]]:
    """(S, n, elements between samples of each tensor); 0 for None and wherever S is 1."""
    given = [t for t in tensors if t is not None]
    if not per_sample and all(t.is_contiguous() for t in given):
        return 1, given[0].numel(), (0,) * len(tensors)
    count = given[0].shape[0]
    strides = tuple(0 if t is None or count == 1 else t.stride(0) for t in tensors)
    return count, given[0].numel() // count, strides


def widest(tensors: Sequence[Tensor]) -> int:
    """Bytes of the widest element."""
    return max(t.element_size() for t in tensors)
