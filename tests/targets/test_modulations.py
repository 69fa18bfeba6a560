# SPDX-License-Identifier: Apache-2.0
"""The first block's modulated input, of every tiny model: what its first attention is given."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

import test_matrix  # noqa: E402
import tiny  # noqa: E402
import tiny_pipelines  # noqa: E402
from unmodulated import WITHOUT  # noqa: E402

import fastcache  # noqa: E402
from fastcache.models.attention import block_lists  # noqa: E402
from fastcache.models.block_io import BlockIO  # noqa: E402
from fastcache.models.registry import adapter_for  # noqa: E402
from fastcache.signals import Signal  # noqa: E402
from fastcache.targets.meters import block_input  # noqa: E402

ATTENTION = ("attn", "attn1", "self_attn", "self_attention")


def first_block(name: str) -> tuple[nn.Module, dict[str, Any], nn.Module, BlockIO]:
    if not hasattr(diffusers, test_matrix.entry(name)["class"]):
        pytest.skip(f"diffusers {diffusers.__version__} has no {test_matrix.entry(name)['class']}")
    model, inputs = test_matrix.build(name)
    row = adapter_for(model)
    block = block_lists(model, row)[0][1][0]
    return model, inputs, block, BlockIO(block, row.block)


@pytest.mark.parametrize("name", [n for n in test_matrix.NAMES if n not in WITHOUT])
def test_it_is_what_the_first_attention_is_given(name):
    model, inputs, block, io = first_block(name)
    found: list[Tensor] = []
    seen: list[Tensor] = []
    block.register_forward_pre_hook(
        lambda m, args, kwargs: found.append(io.modulated(m, args, kwargs)), with_kwargs=True
    )
    attention = next(m for n, m in block.named_modules() if n.split(".")[-1] in ATTENTION)
    attention.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    if "return_dict" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "return_dict": False}
    with torch.no_grad():
        model(**inputs)
    torch.testing.assert_close(found[0], seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", tiny_pipelines.KINDS)
def test_so_it_is_in_every_call_of_a_pipeline(kind):
    """Which may say more than a model on its own is asked: a timestep for each frame, or each token."""
    pipe, given = tiny_pipelines.KINDS[kind]()
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        row = adapter_for(model)
        block = block_lists(model, row)[0][1][0]
        io = BlockIO(block, row.block)
        if io.modulation is None:
            pytest.skip(f"{type(block).__name__} brings the timestep in by a way that is not known")
        attention = next(m for n, m in block.named_modules() if n.split(".")[-1] in ATTENTION)
        found: list[Tensor] = []
        block.register_forward_pre_hook(
            lambda m, args, kwargs, io=io, found=found: found.append(io.modulated(m, args, kwargs)),
            with_kwargs=True,
        )
        attention.register_forward_pre_hook(
            lambda m, args, kwargs, found=found: pairs.append(
                (found.pop(), args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
    steps = {} if kind == "Helios" else {"num_inference_steps": 3}
    pipe(**{**given, **steps, "output_type": "latent"})
    assert len(pairs) >= 3
    for found_there, seen in pairs:
        torch.testing.assert_close(found_there, seen, rtol=1e-5, atol=1e-5)


MADE_OF_PARTS = {
    "Allegro", "Bria", "BriaFibo", "DiT2D", "Flux", "Helios", "HunyuanVideo", "PixArt2D", "QwenImage", "SD3", "Sana",
    "Wan3D",
}  # fmt: skip


def with_parts() -> set[str]:
    """The models whose first block's modulated input one kernel makes, with what that gives checked."""
    found = set()
    for name in [n for n in test_matrix.NAMES if n not in WITHOUT]:
        if not hasattr(diffusers, test_matrix.entry(name)["class"]):
            continue
        model, inputs, block, io = first_block(name)

        def look(m, args, kwargs, io=io, name=name):
            parts = io.modulated_parts(m, args, kwargs)
            if parts is None:
                return
            hidden, scale, shift, eps = parts
            out = torch.empty_like(hidden)
            fastcache.ops.modulated_l1(hidden, scale, shift, torch.zeros_like(out), out, eps)
            wanted = io.modulated(m, args, kwargs)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5, msg=name)
            found.add(name)

        block.register_forward_pre_hook(look, with_kwargs=True)
        if "return_dict" in inspect.signature(model.forward).parameters:
            inputs = {**inputs, "return_dict": False}
        with torch.no_grad():
            model(**inputs)
    return found


def test_one_kernel_makes_it_where_a_plain_normalisation_does():
    assert MADE_OF_PARTS <= with_parts()


@dataclass(frozen=True)
class Since(fastcache.Policy):
    """Reuses while what enters the first block has changed little since the last computed step."""

    threshold: float = 0.2
    signal = Signal("block_input", against="last_computed")

    def _judge(self, run, step, signal, guard):
        reuse = not guard and signal is not None and signal <= self.threshold
        return fastcache.Decision("reuse" if reuse else "compute", signal, self.threshold, guard)


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize(
    "when", [fastcache.InputChange(0.15), Since()], ids=lambda p: type(p).__name__
)
def test_the_kernel_measures_what_its_parts_one_by_one_do(when, way, monkeypatch):
    model, inputs = tiny.build("Flux")
    calls = tiny.trajectory("Flux", inputs, 10, speed=0.1)
    seen = []
    for dtypes in (block_input.DTYPES, ()):
        torch._dynamo.reset()
        monkeypatch.setattr(block_input, "DTYPES", dtypes)
        with fastcache.enable(model, fastcache.Recipe(when)) as cache:
            run = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
            for i, call in enumerate(calls):
                with cache.context("cond", step_index=i, num_inference_steps=len(calls)):
                    tiny.output(run, call)
            seen.append([(r.action, r.signal) for r in cache.stats])
    one, other = seen
    assert [a for a, _ in one] == [a for a, _ in other] and len({a for a, _ in one}) == 2
    assert [s for _, s in one[1:]] == pytest.approx([s for _, s in other[1:]], rel=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
def test_where_it_is_not_known_the_adapters_field_is_named(name):
    model, _, _, io = first_block(name)
    assert io.modulation is None
    with pytest.raises(ValueError, match=r"fastcache\.Block\(modulation="):
        fastcache.enable(model, fastcache.TeaCacheConfig(coefficients=(1, 0)))
    assert "forward" not in model.__dict__
