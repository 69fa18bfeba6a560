# SPDX-License-Identifier: Apache-2.0
"""cache-dit's arithmetic by the op: how often memory is gone over, and what is taken over and given back."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

cache_dit = pytest.importorskip("cache_dit", minversion="1.5")
pytest.importorskip("diffusers", minversion="0.36")

import logging  # noqa: E402

from cache_dit import (  # noqa: E402
    DBCacheConfig,
    TaylorSeerCalibratorConfig,
)

from fastcache.integrations import cache_dit as backend  # noqa: E402

for logger in [n for n in logging.root.manager.loggerDict if n.lower().startswith("cache")]:
    logging.getLogger(logger).setLevel(logging.CRITICAL)


@pytest.fixture
def accelerated():
    backend.accelerate()
    yield
    backend.uninstall()


def taylor(order=1, **fields):
    return TaylorSeerCalibratorConfig(taylorseer_order=order, **fields)


class Counting(TorchDispatchMode):
    """Ops that read or write a tensor as large as the hidden states."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def reused_step(order=1):
    """The arithmetic of one reused step, by op."""
    from cache_dit.caching.cache_contexts.cache_context import CachedContext
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

    manager = CachedContextManager("test", persistent_context=True)
    context = manager.new_context(
        name="one",
        cache_config=DBCacheConfig(enable_separate_cfg=False),
        calibrator_config=taylor(order),
    )
    assert isinstance(context, CachedContext)
    manager.set_context("one")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        manager.mark_step_begin()
        manager.set_Bn_buffer(torch.randn(1, 6, 8, generator=generator), prefix="x_Bn_residual")
    manager.mark_step_begin()
    hidden = torch.randn(1, 6, 8, generator=generator)
    with Counting() as counted:
        value, _ = manager.apply_cache(hidden, None, prefix="x_Bn_residual")
    return value, [op for op in counted.ops if "empty" not in op]


def test_a_taylor_reuse_is_one_op_in_place_of_seven(accelerated):
    found, ops = reused_step()
    backend.uninstall()
    expected, theirs = reused_step()
    assert len(theirs) == 7
    assert ops == ["fastcache.linear_combine_.default"]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_similarity_is_one_op_over_the_hidden_states(accelerated):
    manager = SimpleNamespace(context_manager=None)
    from cache_dit.caching.cache_blocks.pattern_base import CachedBlocks_Pattern_Base as Blocks
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

    manager = CachedContextManager("test", persistent_context=True)
    manager.new_context(
        name="one", cache_config=DBCacheConfig(max_warmup_steps=0, enable_separate_cfg=False)
    )
    manager.set_context("one")
    manager.mark_step_begin()
    x, y, prev = (torch.randn(1, 6, 8) for _ in range(3))
    manager.set_Fn_buffer(prev, prefix="x_Fn_residual")
    blocks = SimpleNamespace(
        context_manager=manager,
        transformer_blocks=[None],
        _iter_cp_split_hooks=lambda block: iter([]),
    )
    residual = Blocks._get_Fn_residual(blocks, x, y)
    with Counting() as counted:
        manager.can_cache(residual, prefix="x_Fn_residual")
    large = [op for op in counted.ops if op.startswith("fastcache")]
    assert large == ["fastcache.residual_l1.default"]
    assert not [op for op in counted.ops if "abs" in op or "sub" in op or "mean" in op]
    expected = (residual - prev).abs().mean() / prev.abs().mean()
    assert manager.get_residual_diffs() == {"0": pytest.approx(float(expected), rel=1e-6)}
    assert "fastcache_pair" not in vars(manager), "activations are held on to"


def test_a_taylor_update_is_one_op_and_never_writes_into_what_it_was_given(accelerated):
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    state = TaylorSeerState(n_derivatives=2)
    values = [torch.randn(2, 3) for _ in range(5)]
    kept = [v.clone() for v in values]
    with Counting() as counted:
        for value in values:
            state.mark_step_begin()
            state.update(value)
    assert [op for op in counted.ops if "empty" not in op] == 5 * [
        "fastcache.taylor_update_.default"
    ]
    assert all(map(torch.equal, values, kept))
    other = torch.randn(4, 3)  # another shape begins anew
    state.mark_step_begin()
    state.update(other)
    assert torch.equal(state.state["dY_current"][0], other)
    assert state.state["dY_current"][1:] == [None, None]


def test_a_state_that_was_filled_before_is_taken_over_and_given_back():
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    def play(switches):
        state, values = TaylorSeerState(n_derivatives=2), []
        generator = torch.Generator().manual_seed(3)
        for step in range(9):
            if step in switches:
                (backend.accelerate if switches[step] else backend.uninstall)()
            state.mark_step_begin()
            if step % 3 == 2:
                values.append(state.approximate())
            else:
                given = torch.randn(2, 3, generator=generator)
                state.update(given)
        backend.uninstall()
        return torch.stack(values)

    assert torch.allclose(play({}), play({3: True}), atol=1e-5)
    assert torch.allclose(play({}), play({0: True, 4: False, 6: True}), atol=1e-5)


def test_numbers_and_what_no_kernel_takes_run_as_before(accelerated):
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    for value in (
        lambda x: np.float64(x * x),
        lambda x: torch.tensor([x * x], dtype=torch.float64),
    ):
        state = TaylorSeerState(n_derivatives=2)
        for x in range(5):
            state.mark_step_begin()
            state.update(value(float(x)))
        state.mark_step_begin()
        assert float(state.approximate()) == pytest.approx(24.0)


def test_gradients_flow_as_before(accelerated):
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    state = TaylorSeerState(n_derivatives=1)
    leaf = torch.ones(3, requires_grad=True)
    with torch.enable_grad():
        for step in range(3):
            state.mark_step_begin()
            state.update(leaf * (step + 1))
        state.mark_step_begin()
        state.approximate().sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 4.0))


def test_uninstall_restores_exactly_and_both_may_be_repeated():
    from cache_dit.caching.cache_blocks.pattern_base import CachedBlocks_Pattern_Base
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    owners = (CachedBlocks_Pattern_Base, CachedContextManager, TaylorSeerState)
    before = [dict(vars(owner)) for owner in owners]
    backend.uninstall()
    backend.accelerate()
    backend.accelerate()
    assert [dict(vars(owner)) for owner in owners] != before
    backend.uninstall()
    backend.uninstall()
    assert [dict(vars(owner)) for owner in owners] == before


def test_a_missing_engine_and_another_version_are_said(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.0.0")
    with pytest.raises(ImportError, match=r"cache-dit is 2\.0\.0, .* 1\.5\.\*"):
        backend.accelerate()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(ImportError, match="cache-dit is not installed"):
        backend.accelerate()


def test_importing_the_integration_imports_no_engine():
    import subprocess

    code = (
        "import sys, fastcache, fastcache.integrations.cache_dit; "
        "assert not {'cache_dit', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bookkeeping_is_hidden_again_once_something_is_compiled(accelerated):
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

    names = ("similarity", "can_cache", "apply_cache", "get_cached_steps", "mark_step_begin")
    assert not any(hasattr(vars(CachedContextManager)[n], "_torchdynamo_disable") for n in names)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert all(hasattr(vars(CachedContextManager)[n], "_torchdynamo_disable") for n in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_are_rounded_as_a_tensor_of_the_dtype_is(dtype):
    from fastcache.integrations.cache_dit.managers import rounded

    values = [0.0, 1.0, 1e-30, 0.123456789, 1 + 2**-8, 1 + 3 * 2**-8, 3.3e38, float("inf")]
    values += torch.rand(200, dtype=torch.float64).tolist()
    for value in values:
        assert rounded(value, dtype) == float(torch.tensor(value, dtype=dtype))
    assert rounded(float("nan"), dtype) != rounded(float("nan"), dtype)


def test_blocks_are_put_in_place_while_the_model_runs_and_its_own_come_back(accelerated):
    from fastcache.integrations.cache_dit.accelerate import in_place

    model = torch.nn.ModuleDict({"first": torch.nn.Identity(), "blocks": torch.nn.ModuleList()})
    own, ours = model.blocks, torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(KeyError, match="inside"), in_place(model, "blocks", ours):
        assert model.blocks is ours and "blocks" in model.state_dict(keep_vars=True)._metadata
        raise KeyError("inside")
    assert model.blocks is own and list(model._modules) == ["first", "blocks"]
    model.plain = 1
    with in_place(model, "plain", 2):
        assert model.plain == 2
    assert model.plain == 1
