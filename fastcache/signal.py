"""The only place where a value crosses from the device to the host, and where ranks agree on one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def relative_change(sums: Tensor, group: Any = None) -> float:
    """First over second of the two sums of `ops.residual_l1`, summed over the ranks of `group` first.

    One device read. NaN or infinity comes back as it is: policies compute then.
    """
    if group is not None:
        sums = agreed(sums, group)
    change, size = sums.tolist()
    return (
        change / size
        if size
        else (float("nan") if change == 0 or change != change else float("inf"))
    )


def agreed(sums: Tensor, group: Any) -> Tensor:
    """The sums over all ranks of `group`, in one packed reduction."""
    total = sums.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def scalar(value: Any) -> float:
    """A number or the first element of a tensor, as a float."""
    if isinstance(value, Tensor):
        if value.numel() == 0:
            raise ValueError("timestep is an empty tensor, must hold a number")
        return float(value.reshape(-1)[0].item())
    return float(value)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold equal values. Reads the device: for recording calls only."""
    return a.shape == b.shape and torch.equal(a, b)


def numbers(values: list[Tensor]) -> list[float]:
    """One-element tensors as floats, in one read: for calibration, after a run."""
    return torch.cat([v.reshape(-1) for v in values]).tolist() if values else []
