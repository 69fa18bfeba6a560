# SPDX-License-Identifier: Apache-2.0
"""A batch whose samples belong to different requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..graphs.compiled import driven
from ..runtime.context import Context
from ..runtime.mixed import Sample, call_mixed
from ..runtime.patch import ATTACHED


def split_batch(
    call: Callable[..., Any],
    contexts: Sequence[Context],
    inputs: Mapping[str, Any],
    shared: Sequence[str] = (),
) -> Any:
    """Call a model once per sample of a batch, every sample under the context of its own request.

    For servers whose batch holds requests at different steps: each keeps its own schedule and its own state,
    and samples come and go between calls. What is lost is batching in the computed steps.

    Args:
        call: the model.
        contexts: one `cache.context(name, request=..., step_index=...)` per sample, unopened.
        inputs: keyword arguments of the call. A tensor [B, ...], B the number of contexts, is split;
            everything else goes to all samples.
        shared: names of inputs that go to all samples although their first dimension is B.
    Returns:
        What the model returns, tensors joined along dimension 0, anything else from the first sample.
    Raises:
        ValueError: no input has a first dimension of B.
    Source: ours; docs/serving.md has an example.
    """
    batched = _batched(len(contexts), inputs, shared)
    outputs = []
    for i, context in enumerate(contexts):
        with context:
            outputs.append(call(**_some(inputs, batched, [i])))
    return tree_map(
        lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs
    )


def mixed_batch(
    model: Callable[..., Any],
    contexts: Sequence[Context],
    inputs: Mapping[str, Any],
    shared: Sequence[str] = (),
    runs: Sequence[Any] | None = None,
) -> Any:
    """Call a model once for a batch whose samples belong to different requests, each decided by itself.

    Each sample has the schedule and the state of its own request. Those that compute run as a smaller batch, and
    so do those that reuse; a batch that agrees is one call with the inputs as they are. Where the first block
    decides, it runs in one call for all, and those that compute and those that reuse go on from it in a call each
    unless they agree. So it is for a recipe of one `Stack`, and for "off"; every other sample is a call of its own,
    and so is the first of each shape. Compiled, a batch is split into calls of 8, 4, 2 and 1 samples, each with a
    program of its own; with `cudagraphs` or `on_device` every sample is a call of its own.

    Args:
        model: the model that `fastcache.enable` was called on, a denoiser of such a pipeline, or what
            `fastcache.compile` made of it.
        contexts: one `cache.context(name, request=..., step_index=...)` per sample, unopened.
        inputs: keyword arguments of the call. A tensor [B, ...], B the number of contexts, is split;
            everything else goes to all samples.
        shared: names of inputs that go to all samples although their first dimension is B.
        runs: the `cache.run(...)` that each sample belongs to, entered and paused, or None; their recipes may differ.
    Returns:
        What the model returns, tensors joined along dimension 0, anything else from one of the samples.
    Raises:
        TypeError: `model` is neither an nn.Module nor made by `fastcache.compile`.
        ValueError: it is not enabled, two contexts say the same, or no input has a first dimension of B.
    Source: ours; docs/serving.md has an example.
    """
    module, programs_of = driven(model) or (model, None)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"model is {type(model).__name__}, must be the nn.Module that was enabled, or fastcache.compile of it"
        )
    denoiser = module.__dict__.get(ATTACHED)
    if denoiser is None:
        raise ValueError("model is not enabled; call fastcache.enable(model, config) first")
    count = len(contexts)
    if runs is not None and len(runs) != count:
        raise ValueError(f"runs has {len(runs)} entries for {count} contexts")
    batched = _batched(count, inputs, shared)
    samples = [
        Sample(i, context, runs[i] if runs else None, _some(inputs, batched, [i]))
        for i, context in enumerate(contexts)
    ]
    names = {sample.key for sample in samples}
    if len(names) < count:
        raise ValueError(
            f"contexts: {count} contexts name {len(names)} branches of requests; give each sample one of its own"
        )

    def gather(places: Sequence[int]) -> dict[str, Any]:
        return dict(inputs) if len(places) == count else _some(inputs, batched, places)

    parts = call_mixed(denoiser, samples, gather, programs_of)
    if len(parts) == 1:
        return parts[0][1]
    found = {p: (part, row) for part, (ps, _) in enumerate(parts) for row, p in enumerate(ps)}

    def whole(*values: Any) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        rows = (found[place] for place in range(count))
        return torch.cat([values[part][row : row + 1] for part, row in rows])

    return tree_map(whole, *(output for _, output in parts))


def _batched(count: int, inputs: Mapping[str, Any], shared: Sequence[str]) -> set[str]:
    """Names of the inputs that hold a sample per context. Raises ValueError where there is none."""

    def of_batch(name: str, value: Any) -> bool:
        return isinstance(value, Tensor) and name not in shared and value.shape[:1] == (count,)

    batched = {name for name, value in inputs.items() if of_batch(name, value)}
    if not batched:
        raise ValueError(
            f"inputs: none has a first dimension of {count}, the number of contexts; got "
            f"{ {k: tuple(v.shape) for k, v in inputs.items() if isinstance(v, Tensor)} }"
        )
    return batched


def _some(inputs: Mapping[str, Any], batched: set[str], places: Sequence[int]) -> dict[str, Any]:
    """The inputs of some of the samples."""

    def of(value: Tensor) -> Tensor:  # by slices: a list of places would be copied to the device
        parts = [value[place : place + 1] for place in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return {k: of(v) if k in batched else v for k, v in inputs.items()}
