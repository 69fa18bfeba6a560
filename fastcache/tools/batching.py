# SPDX-License-Identifier: Apache-2.0
"""A batch whose samples belong to different requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..runtime.context import Context


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
    count = len(contexts)

    def of_batch(name: str, value: Any) -> bool:
        return isinstance(value, Tensor) and name not in shared and value.shape[:1] == (count,)

    batched = {name for name, value in inputs.items() if of_batch(name, value)}
    if not batched:
        raise ValueError(
            f"inputs: none has a first dimension of {count}, the number of contexts; got "
            f"{ {k: tuple(v.shape) for k, v in inputs.items() if isinstance(v, Tensor)} }"
        )
    outputs = []
    for i, context in enumerate(contexts):
        one = {k: v[i : i + 1] if k in batched else v for k, v in inputs.items()}
        with context:
            outputs.append(call(**one))
    return tree_map(
        lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs
    )
