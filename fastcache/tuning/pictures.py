# SPDX-License-Identifier: Apache-2.0
"""What a generation returns, as pictures that can be compared, and how near two of them are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import sync

BEST = 140.0  # dB of an error that no float32 run shows; equal pictures count as infinitely near
SEVERAL = 4  # dimensions from which on the first one counts pictures


class Picture(NamedTuple):
    """One picture or video: its values, and the largest that one of its kind can have, where that is known."""

    values: Tensor  # float32, on the host
    peak: float | None


def pictures_in(made: Any) -> list[Picture]:
    """The pictures of a tensor, array, PIL image or a list of them; of a pipeline's output those in `images`
    or `frames`.

    Raises:
        TypeError: it is something else.
        ValueError: there is none, or one is empty.
    """
    for name in ("images", "frames"):
        made = getattr(made, name, made)
    found = _collect(made)
    if not found:
        raise ValueError(
            "tune: generate returned no picture; return a tensor, an array, an image or a list of them"
        )
    return found


def _collect(made: Any) -> list[Picture]:
    if isinstance(made, Mapping) or isinstance(made, str | bytes):
        raise _unknown(made)
    if isinstance(made, Sequence):
        return [picture for part in made for picture in _collect(part)]
    tensor = made if isinstance(made, Tensor) else _from_array(made)
    if not tensor.numel():
        raise ValueError(f"tune: generate returned an empty picture of shape {tuple(tensor.shape)}")
    peak = None if tensor.is_floating_point() else float(torch.iinfo(tensor.dtype).max)
    values = sync.on_host(tensor)
    several = values.dim() >= SEVERAL
    return [Picture(part, peak) for part in (values.unbind(0) if several else (values,))]


def _from_array(made: Any) -> Tensor:
    if not hasattr(made, "__array__") and not hasattr(made, "__array_interface__"):
        raise _unknown(made)
    array = np.asarray(made)
    if array.dtype.kind not in "fui":
        raise _unknown(made)
    return torch.from_numpy(array.copy())


def _unknown(made: Any) -> TypeError:
    return TypeError(
        f"tune: generate returned {type(made).__name__}, must return a tensor, an array, a PIL image or a list of them"
    )


def psnr(made: list[Picture], wanted: list[Picture]) -> float:
    """Peak signal-to-noise ratio in dB, mean over pictures; infinite where all are equal.

    The peak of floating values is the span of the wanted ones.

    Raises:
        ValueError: there are not as many, or one has another shape.
    """
    shapes = [[tuple(p.values.shape) for p in pictures] for pictures in (made, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"tune: generate returned pictures of shapes {shapes[0][:3]} in one run and {shapes[1][:3]} in another"
        )
    ratios, equal = [], True
    for one, other in zip(made, wanted, strict=True):
        values = other.values.double()
        error = sync.scalar((one.values.double() - values).square().mean())
        if error != error:
            return -math.inf
        peak = other.peak if other.peak is not None else sync.scalar(values.amax() - values.amin())
        equal = equal and not error
        found = 10 * math.log10(peak**2 / error) if error and peak else BEST if not error else -BEST
        ratios.append(min(found, BEST))
    return math.inf if equal else sum(ratios) / len(ratios)
