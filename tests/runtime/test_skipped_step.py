# SPDX-License-Identifier: Apache-2.0
"""How much Python of ours a skipped step runs: counted, since a clock says another thing on every machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # as most who generate have it loaded: a context then gets ready for compiled calls
from torch import Tensor, nn

import fastcache

OURS = str(Path(fastcache.__file__).parent)
STEPS = 1000


class Block(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(57))

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def counted(run: Callable[[], object]) -> Counter[str]:
    """How often each function of ours is entered."""
    found: Counter[str] = Counter()

    def entered(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(OURS):
            found[f"{Path(code.co_filename).stem}.{code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(entered)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


MAG = fastcache.MagCacheConfig(
    threshold=1e9, max_skip_steps=STEPS, retention_ratio=0.0, num_inference_steps=STEPS,
    mag_ratios=[1.0, 1.0],
)  # fmt: skip
FIRST = fastcache.FirstBlockCacheConfig(threshold=1e9)


@pytest.mark.parametrize(
    ("config", "named", "timed", "most"),
    [
        (MAG, True, False, 39),
        (MAG, False, False, 43),
        (MAG, True, True, 46),
        (FIRST, True, False, 51),
        (FIRST, True, True, 58),
    ],
)
def test_a_skipped_step_enters_no_more_functions(config, named, timed, most):
    """A ratchet: where a step comes to need more, something else has to go, or the number says why not."""
    model, x = Model().eval(), torch.randn(1, 4, 8)
    times = iter([torch.tensor(1000.0 - i) for i in range(STEPS)])
    with fastcache.enable(model, config) as cache, torch.no_grad():

        def step() -> None:
            given = {"timestep": next(times)} if timed else {}
            if named:
                with cache.context("cond"):
                    model(x, **given)
            else:
                model(x, **given)

        for _ in range(20):
            step()
        found = counted(step)
        assert [r.action for r in cache.stats][-1] == "reuse"
    assert sum(found.values()) <= most, found.most_common()
