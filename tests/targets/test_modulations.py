"""The first block's modulated input, of every tiny model: what its first attention is given."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

import test_matrix  # noqa: E402
from unmodulated import WITHOUT  # noqa: E402

import fastcache  # noqa: E402
from fastcache.models.attention import block_lists  # noqa: E402
from fastcache.models.block_io import BlockIO  # noqa: E402
from fastcache.models.registry import adapter_for  # noqa: E402

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


@pytest.mark.parametrize("name", WITHOUT)
def test_where_it_is_not_known_the_adapters_field_is_named(name):
    model, _, _, io = first_block(name)
    assert io.modulation is None
    with pytest.raises(ValueError, match=r"fastcache\.Block\(modulation="):
        fastcache.enable(model, fastcache.TeaCacheConfig(coefficients=(1, 0)))
    assert "forward" not in model.__dict__
