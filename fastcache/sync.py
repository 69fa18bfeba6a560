# SPDX-License-Identifier: Apache-2.0
"""The only place where a value crosses from the device to the host, and where ranks agree on one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SPEAKING = (
    "sum",
    "first",
)  # whose numbers count where ranks share a sample: those of all, or of the first


class Ranks(NamedTuple):
    """Ranks that share a sample, and decide alike."""

    group: Any
    speaks: bool  # whether this rank's numbers count
    voices: int  # ranks whose numbers do


def ranks_of(group: Any, speaking: str) -> Ranks | None:
    """How the ranks of a process group come to one number; None without one."""
    if group is None:
        return None
    if speaking == "first":
        return Ranks(group, torch.distributed.get_rank(group) == 0, 1)
    return Ranks(group, True, torch.distributed.get_world_size(group))


def relative_change(sums: Tensor, group: Ranks | None = None, mean: bool = False) -> float:
    """First over second of the two sums of `ops.residual_l1`, summed over the ranks of `group` first.

    Of sums per sample, [B, 2], the largest ratio, or their mean. One device read. NaN or infinity comes back as
    it is: policies compute then.
    """
    if group is not None:
        sums = agreed(sums, group)
    if sums.dim() == 1:
        change, size = sums.tolist()
        return change / size if size else _of_nothing(change)
    ratios = [change / size if size else _of_nothing(change) for change, size in sums.tolist()]
    return sum(ratios) / len(ratios) if mean else largest(ratios)


def expected_change(sums: Tensor, group: Ranks | None = None) -> float:
    """Of sums |x - x'|, |v' - v''|, |x' - x''| and |v'|, first times second over third times fourth.

    Summed over the ranks of `group` first; of sums per sample, [B, 4], the largest. One device read.
    """
    if group is not None:
        sums = agreed(sums, group)
    return largest([_expected(*row) for row in sums.reshape(-1, 4).tolist()])


def _expected(moved: float, changed: float, before: float, size: float) -> float:
    if moved == changed == before == 0:
        return 0.0 if size == size else size  # it stands still
    return moved * changed / (before * size) if before * size else _of_nothing(moved * changed)


def norm(squares: Tensor, group: Ranks | None = None) -> float:
    """The root of a sum of squares, summed over the ranks of `group` first; of several the largest. One device
    read."""
    if group is not None:
        squares = agreed(squares, group)
    return largest([math.sqrt(s) if s >= 0 else math.nan for s in squares.flatten().tolist()])


def largest(values: list[float]) -> float:
    """The largest number; NaN where any of them is that."""
    return next((v for v in values if v != v), max(values))


def _of_nothing(change: float) -> float:
    """A change relative to zero."""
    return float("nan") if change == 0 or change != change else float("inf")


def agreed(sums: Tensor, group: Ranks, veto: bool = False) -> Tensor:
    """The sums over the ranks of `group` whose numbers count, in one packed reduction. Every rank gets the same bits.

    veto: what this rank says counts whichever it is.
    """
    total = sums.clone() if group.speaks or veto else torch.zeros_like(sums)
    _meet(total, group.group, torch.distributed.ReduceOp.SUM)
    return total


def mean(value: Tensor, group: Ranks | None = None) -> float:
    """A one-element tensor as a float; its mean over the ranks of `group`, where there is one."""
    if group is None:
        return scalar(value)
    return scalar(agreed(value, group)) / group.voices


def unanimous(digest: bytes, group: Any, device: torch.device) -> bool:
    """Whether all ranks of `group` hold the same 32 bytes; every rank gets the same answer."""
    words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, len(digest), 4)]
    if "gloo" in str(torch.distributed.get_backend(group)):
        device = torch.device("cpu")
    both = torch.tensor([words, [-word for word in words]], device=device)
    _meet(both, group, torch.distributed.ReduceOp.MAX)
    most, least = both.tolist()
    return most == [-word for word in least]


def any_rank(flag: bool, group: Any, device: torch.device) -> bool:
    """Whether it is true on any rank of `group`; every rank gets the same answer."""
    if "gloo" in str(torch.distributed.get_backend(group)):
        device = torch.device("cpu")
    one = torch.tensor([int(flag)], device=device)
    _meet(one, group, torch.distributed.ReduceOp.MAX)
    return bool(one.item())


def _meet(values: Tensor, group: Any, op: Any) -> None:
    """Reduce in place over the ranks. Fails within the group's timeout where one of them is missing.

    gloo raises here; NCCL's watchdog ends the process after the timeout that the group was made with.
    """
    try:
        torch.distributed.all_reduce(values, op=op, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            "process_group: a rank did not take part in a decision: it has died, stopped with an error, or "
            "does not take the same steps; after an error on one rank, call cache.reset() on all"
        ) from error


def scalar(value: Any) -> float:
    """A number or the first element of a tensor, as a float."""
    if isinstance(value, Tensor):
        if value.numel() == 0:
            raise ValueError("timestep is an empty tensor, must hold a number")
        one = value if value.numel() == 1 else value.reshape(-1)[0]
        return float(one.item())
    return float(value)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold equal values. Reads the device: for recording calls only."""
    return a.shape == b.shape and torch.equal(a, b)


def numbers(values: list[Tensor]) -> list[float]:
    """One-element tensors as floats, in one read: for calibration, after a run."""
    return torch.cat([v.reshape(-1) for v in values]).tolist() if values else []


def extreme(timesteps: Tensor, ascending: bool) -> tuple[float, Any]:
    """The timestep of the noisiest part, and what two calls of one step have in common.

    timesteps: of any shape: one for all, per sample, per frame or per token, of which some may be pinned.
    """
    if timesteps.numel() == 1:
        number = float(timesteps.item())
        return number, number
    flat = timesteps.detach().flatten().double()
    low, high, mean = torch.stack([flat.amin(), flat.amax(), flat.mean()]).tolist()
    number = low if ascending else high
    return number, number if low == high else (low, high, mean)


def wait(device: torch.device) -> None:
    """Until everything that was launched on a device is done: for clocks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def moment(device: torch.device, clock: Callable[[], float]) -> Any:
    """Now, as the device will come to it: of a GPU an event among what is launched, elsewhere the clock's seconds."""
    if device.type != "cuda":
        return clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(start: Any, end: Any) -> float:
    """From one moment to another, once both are over; in seconds, or a GPU's milliseconds."""
    return end - start if isinstance(start, float) else start.elapsed_time(end)


def on_host(values: Tensor) -> Tensor:
    """Values as float32 in host memory: for pictures, after a run."""
    return values.detach().to("cpu", torch.float32)
