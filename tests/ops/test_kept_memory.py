# SPDX-License-Identifier: Apache-2.0
"""No op keeps a tensor that it allocates, and none allocates the result that it is given.

What lives on may belong to the pool of a captured graph.

Started as a script, this file is the child process in which Triton finds a stub of libcuda.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stubbed_gpu
import torch
from test_triton_launcher import every_op
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastcache
from fastcache.ops.dispatch import backends, function
from fastcache.ops.registry import BODIES


class Allocations(TorchDispatchMode):
    """The storages of all that ops return while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [
            StorageWeakRef(t.untyped_storage()) for t in tree_leaves(out) if isinstance(t, Tensor)
        ]
        return out


def kept(call: Callable[[], object], given: list[Tensor]) -> int:
    """How many of the storages that a call makes outlive it, those of `given` aside."""
    with Allocations() as allocations:
        call()
    gc.collect()
    assert allocations.made, "nothing was allocated: the test sees nothing"
    own = {t.untyped_storage()._cdata for t in given}
    return sum(not made.expired() and made.cdata not in own for made in allocations.made)


def operands() -> list[Tensor]:
    return [torch.randn(2, 64, 320) for _ in range(4)]


def calls(y: Tensor, x: Tensor, prev: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    """The bodies of the ops that allocate on some backend."""
    prior, two, eps = torch.zeros(1), torch.zeros(2), 1e-8
    return {
        "residual_l1": lambda: BODIES["residual_l1"](y, x, prev),
        "residual_l1_": lambda: BODIES["residual_l1_"](out, y, x, prev, True),
        "residual_magnitude": lambda: BODIES["residual_magnitude"](y, x, prev, eps),
        "residual_magnitude_": lambda: BODIES["residual_magnitude_"](prev, y, x, prev, eps, True),
        "guided_weights": lambda: BODIES["guided_weights"](y, [x, prev], prior, 0.003),
        "_check_into_": lambda: BODIES["_check_into_"](
            torch.empty(4), torch.empty(1), y, [x, prev, out], [y, x, prev], two, prior, 0.003
        ),
        "_exponential_weights": lambda: BODIES["_exponential_weights"](
            [y, x, prev, out], prior, 0.003
        ),
    }


@pytest.mark.parametrize("op", calls(*operands()))
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_an_op_keeps_nothing(backend: str, op: str) -> None:
    if backends()[backend] is not True:
        pytest.skip(str(backends()[backend]))
    given = operands()
    call = calls(*given)[op]
    with fastcache.backend(backend):
        call()
        assert kept(call, given) == 0


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("op", "result"), [("residual_l1", "sums"), ("residual_magnitude", "mean")]
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_result_goes_where_it_is_wanted(
    backend: str, op: str, result: str, per_sample: bool
) -> None:
    if backends()[backend] is not True:
        pytest.skip(str(backends()[backend]))
    metric = function(backend, op)
    for tokens in (64, 0):
        y, x, prev, _ = (t[:, :tokens] for t in operands())
        want = metric(y, x, prev, per_sample=per_sample)
        got = torch.full_like(want, 7.0)
        assert metric(y, x, prev, per_sample=per_sample, **{result: got}) is got
        assert torch.equal(got.nan_to_num(5.0), want.nan_to_num(5.0))


def test_what_is_kept_is_seen() -> None:
    cache = []
    assert kept(lambda: cache.append(torch.empty(3)), []) == 1


def triton_kept() -> dict[str, int]:
    """What calls of the launchers keep: the first, which the JIT makes, and one past it."""
    from fastcache.triton_kernels import counters

    stubbed_gpu.install()
    given = [torch.empty(2, 64, 320) for _ in range(4)]
    # stands for the variable of a module, which no allocator of torch owns
    counters.counters(given[0], 1)
    found = {}
    for op, call in every_op(*given).items():
        reduces = any(word in op for word in ("l1", "magnitude", "guided", "exponential"))
        for name in ("first", "second"):
            if reduces:
                found[f"{op}, {name}"] = kept(call, given)
    return found


@pytest.mark.skipif(bool(stubbed_gpu.missing()), reason=stubbed_gpu.missing())
def test_a_triton_launcher_keeps_nothing(tmp_path: Path) -> None:
    env = stubbed_gpu.environment(tmp_path)
    child = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(child, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 18 and found == dict.fromkeys(found, 0)


if __name__ == "__main__":
    print(json.dumps(triton_kept()))
