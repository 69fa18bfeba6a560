# SPDX-License-Identifier: Apache-2.0
"""Every diffusers transformer that can be built small, under every method.

Each cell runs a trajectory that stands still: the same inputs at every step. What a method reuses
or forecasts is then exactly what the model would have computed, so the output must be the uncached
one up to rounding: a text stream in the image's place, a residual left out or counted twice, or half
batches in the wrong order all show. `PYTHONPATH=tests python tests/parity/test_matrix.py [name ...]`
prints the table. Classes without a row are in `LEFT_OUT`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from unmodulated import WITHOUT  # noqa: E402

import fastcache  # noqa: E402
from fastcache.models.block_io import model_input  # noqa: E402

STEPS = 6
MORE: dict[str, dict] = json.loads(
    (Path(__file__).parents[1] / "more_tiny_models.json").read_text()
)
NAMES = (*tiny.ENTRIES, *MORE)
TOLERANCE = 2e-4  # of the largest output value; fp32 sums in another order, through three blocks


def mid_range() -> float:
    """A timestep inside the ranges of every method's defaults."""
    return 500.0


def _faster(**fields: Any) -> fastcache.FasterCacheConfig:
    return fastcache.FasterCacheConfig(
        alpha_low_frequency=1.0,
        alpha_high_frequency=1.0,
        current_timestep_callback=mid_range,
        **fields,
    )


def latents_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """What a model is called with, whatever its form, as latents [C, T, H, W]."""
    value = next(kwargs[name] for name in LATENTS if name in kwargs)
    found = []
    for sample in value:  # a batch, or a list
        tensor = first(sample)
        while tensor.dim() > 4:
            tensor = tensor.flatten(0, 1)
        found.append(tensor.float().reshape(*[1] * (4 - tensor.dim()), *tensor.shape))
    return found


METHODS: dict[str, Callable[..., Any]] = {
    "FirstBlock": lambda: fastcache.FirstBlockCacheConfig(0.2),
    "MagCache": lambda: fastcache.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "TaylorSeer": lambda: fastcache.TaylorSeerCacheConfig(
        disable_cache_before_step=2, cache_interval=3, taylor_factors_dtype=None
    ),
    "lite": lambda: fastcache.TaylorSeerCacheConfig(
        disable_cache_before_step=2,
        cache_interval=3,
        taylor_factors_dtype=None,
        use_lite_mode=True,
    ),
    "PAB": lambda: fastcache.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=mid_range
    ),
    "FasterCache": lambda: _faster(is_guidance_distilled=True),
    "guidance": lambda layout: _faster(tensor_format=layout),
    "TeaCache": lambda: fastcache.TeaCacheConfig(0.2, (1, 0)),
    "EasyCache": lambda: fastcache.EasyCacheConfig(0.2, warmup=2),
    "SeaCache": lambda: fastcache.SeaCacheConfig(0.2, raw_vision_callback=latents_of),
    "SenCache": lambda: fastcache.SenCacheConfig(0.2, 1.0, 1.0),
    "DBCache": lambda: fastcache.DBCacheConfig(1, 1, 0.2, max_warmup_steps=2),
    "Spectrum": lambda: fastcache.Recipe(
        fastcache.Widening(warmup=2), fastcache.Chebyshev(1, ridge=0.0)
    ),
    "planned": lambda: fastcache.Recipe(
        fastcache.Mask((1, 1, 0, 0, 1, 0)),
        fastcache.Fitted(((2, (1, 0), (1.5, -0.5)), (5, (4, 1, 0), (2.0, -2.0, 1.0)))),
    ),
}
LATENTS = ("hidden_states", "x", "vision_tokens", "bb_ca", "decoder_input_tokens")
LAYOUTS = {4: "BCHW", 5: "BCFHW"}  # of outputs; a token sequence has none of FasterCache's layouts

# What cannot be done, and why. Nothing else may be refused.
TOKENS = "token sequence"  # what the guidance half rebuilds is an image or a video
UNBATCHED = "needs one batched output tensor"
COLLECTED = "the model keeps what each block"  # a ControlNet's residuals are taken between blocks
ON_TOKENS = (
    "AceStep",
    "Bria",
    "BriaFibo",
    "Chroma",
    "Flux",
    "Flux2",
    "Flux3",
    "Ideogram4",
    "JoyImageEditPlus",
    "Krea2",
    "LTX",
    "LTX2",
    "LongCatAudio",
    "LongCatImage",
    "MiniMaxH3",
    "MiniMaxMusic3",
    "NucleusMoE",
    "OvisImage",
    "Prior",
    "QwenImage",
    "QwenImage21",
    "RFD4Proteina",
    "SanaWMRefiner",
    "StableAudio",
    "StableAudio3",
    "T5Film",
)
# its first block's modulated input is not known (tests/test_modulations.py says why, model by model)
UNMODULATED = "needs the normalisation with the timestep in it"
TURNS = "the model runs them in another order"  # its lists take turns, so it has no last blocks
REFUSED: dict[str, dict[str, str]] = {name: {"TeaCache": UNMODULATED} for name in WITHOUT}
for _name in ON_TOKENS:
    REFUSED.setdefault(_name, {})["guidance"] = TOKENS
for _name in ("Cosmos3Omni", "ZImage"):
    REFUSED.setdefault(_name, {})["guidance"] = UNBATCHED
for _name in ("Latte", "LatteVideo"):
    REFUSED.setdefault(_name, {})["DBCache"] = TURNS
REFUSED["QwenImageControlNet"] = {
    **dict.fromkeys(
        (
            "FirstBlock",
            "MagCache",
            "TeaCache",
            "SeaCache",
            "SenCache",
            "DBCache",
            "Spectrum",
            "planned",
        ),
        COLLECTED,
    ),
    "guidance": TOKENS,
}
_flux2 = pytest.importorskip("diffusers.models.transformers.transformer_flux2")
_block = _flux2.Flux2TransformerBlock
if "temb_mod_img" not in inspect.signature(_block.forward).parameters:
    REFUSED.setdefault("Flux2", {})["TeaCache"] = UNMODULATED  # before diffusers 0.37
# Classes of diffusers that are not in the table, and why.
LEFT_OUT = {
    "MiniMaxMusic3RVQDepthDecoder": "a language model, called per token and not per timestep",
    "QwenImageMultiControlNetModel": "has no blocks of its own: a list of QwenImageControlNetModel",
    "T5FilmEncoder": "runs once, before the denoiser",
    "WanAnimate2Transformer3DModel": "needs flex attention compiled, and keys that a call before it has kept",
}


def entry(name: str) -> dict:
    return tiny.ENTRIES.get(name) or MORE[name]


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return tiny.build(name) if name in tiny.ENTRIES else tiny.build_entry(MORE[name])


def double(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """Inputs of a guidance batch [unconditional; conditional]: what has the batch first is repeated."""

    def twice(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
            return torch.cat([value * 0.9 if value.is_floating_point() else value, value])
        if isinstance(value, list) and len(value) == batch:
            return [*value, *value]
        if isinstance(value, list | tuple):
            return type(value)(twice(v) for v in value)
        return value

    shared = ("rope", "rotary", "indices")  # positions, the same for every sample
    doubled = {k: v if any(word in k for word in shared) else twice(v) for k, v in inputs.items()}
    if "encoder_hidden_states_llama3" in inputs:  # [layers, batch, ...]
        doubled["encoder_hidden_states_llama3"] = inputs["encoder_hidden_states_llama3"].repeat(
            1, 2, 1, 1
        )
    return doubled


def first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def run(
    model: nn.Module, inputs: dict[str, Any], cache: Any = None, context: str = "cond"
) -> tuple[list[Tensor], int]:
    """Outputs of the steps, and how many module calls they took."""
    outputs, calls = [], [0]

    def count(module: nn.Module, args: Any) -> None:
        calls[0] += 1

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    if "return_dict" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "return_dict": False}
    try:
        with torch.no_grad():
            for i in range(STEPS):
                if cache is None:
                    outputs.append(first(model(**inputs)))
                    continue
                told = {"step_index": i, "num_inference_steps": STEPS}
                with cache.context(context, timestep=500.0, sigma=0.5, **told):
                    outputs.append(first(model(**inputs)))
    finally:
        handle.remove()
    return outputs, calls[0]


def surface(model: nn.Module) -> dict[str, Any]:
    """All that a disabled cache must leave as it was."""
    return {
        name: (type(m), sorted(m.__dict__), list(m._modules), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


def guided(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Tensor, int]:
    """Inputs of a guidance batch, and what the model makes of them; ValueError where it takes none."""
    latents = next(inputs[k] for k in LATENTS if k in inputs)
    inputs = double(inputs, len(latents))
    try:
        (expected, *_), calls = run(model, inputs)
    except RuntimeError as error:
        raise ValueError(f"the model takes no batch of two here: {error}") from error
    return inputs, expected, calls


def cell(
    model: nn.Module, inputs: dict[str, Any], expected: Tensor, calls: int, method: str
) -> str:
    """One cell of the table: the share of module calls saved, or why it is refused."""
    before = surface(model)
    context, config = "cond", METHODS[method]
    try:
        if method == "guidance":
            inputs, expected, calls = guided(model, inputs)
            context, layout = "cond_uncond", LAYOUTS.get(expected.dim(), "BCFHW")
            config = functools.partial(config, layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fastcache.enable(model, config()) as cache:
                outputs, cached_calls = run(model, inputs, cache, context)
                reused = cache.stats.reused
    except ValueError as error:
        assert surface(model) == before
        return f"refused: {error}"
    assert surface(model) == before
    assert reused and cached_calls < calls, f"{cached_calls} of {calls} module calls"
    scale = expected.abs().max().item()
    for i, output in enumerate(outputs):
        assert output.shape == expected.shape
        assert torch.isfinite(output).all()
        error = (output - expected).abs().max().item() / scale
        if method != "lite":  # zeros from its blocks: not meant to give the model's output
            assert error <= TOLERANCE, f"step {i} is off by {error:.2e} of the largest value"
    return f"{100 * (1 - cached_calls / calls):.0f}%"


def row(name: str) -> dict[str, str]:
    """All cells of one model; what should not happen reads FAILED."""
    model, inputs = build(name)
    (expected, *_), calls = run(model, inputs)
    cells = {}
    for method in METHODS:
        try:
            cells[method] = cell(model, inputs, expected, calls, method)
        except Exception as error:
            cells[method] = f"FAILED {type(error).__name__}: {error}"
    (again, *_), _ = run(model, inputs)
    assert torch.equal(again, expected), "the model does not give the same output after disable"
    return cells


@pytest.mark.parametrize("name", NAMES)
def test_every_method_skips_and_reproduces_a_still_trajectory(name):
    if not hasattr(diffusers, entry(name)["class"]):
        pytest.skip(f"diffusers {diffusers.__version__} has no {entry(name)['class']}")
    cells = row(name)
    refused = {m: text for m, text in cells.items() if not text.endswith("%")}
    for method, reason in REFUSED.get(name, {}).items():
        assert reason in refused.pop(method)
    assert not refused


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_against_other_steps_are_the_latents(name):
    # Cosmos 3 is called with its prompt's tokens first, which never change: SenCache saw the timestep alone
    if not hasattr(diffusers, entry(name)["class"]):
        pytest.skip(f"diffusers {diffusers.__version__} has no {entry(name)['class']}")
    _, inputs = build(name)
    assert model_input((), inputs) is next(inputs[k] for k in LATENTS if k in inputs)


def test_every_denoiser_of_diffusers_is_in_the_table():
    listed = {entry(name)["class"] for name in NAMES} | LEFT_OUT.keys()
    rooms = [
        importlib.import_module(f"diffusers.models.{r}") for r in ("transformers", "controlnets")
    ]
    everything = {name: value for room in rooms for name, value in vars(room).items()}
    cacheable_kind = importlib.import_module("diffusers.models.cache_utils").CacheMixin
    denoisers = set()
    for name, value in everything.items():
        if isinstance(value, type) and issubclass(value, diffusers.ModelMixin):
            cacheable = issubclass(value, cacheable_kind)
            if cacheable or "transformers" in value.__module__:
                denoisers.add(name)
    assert len(denoisers) > 40
    assert denoisers - listed == set()


def table(names: Sequence[str]) -> Iterator[str]:
    """The lines of the table, refusals numbered and spelled out below."""
    yield f"{'':22}" + "".join(f"{m:>12}" for m in METHODS)
    reasons: list[str] = []
    for name in names:
        shown = []
        for text in row(name).values():
            if not text.endswith("%"):
                key = re.sub(r"\([\d, ]*\)", "(...)", text)
                if key not in reasons:
                    reasons.append(key)
                text = f"{text[:1]}[{reasons.index(key) + 1}]"
            shown.append(text)
        yield f"{name:22}" + "".join(f"{t:>12}" for t in shown)
    for i, reason in enumerate(reasons):
        yield f"[{i + 1}] {reason}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table(sys.argv[1:] or NAMES):
        print(line, flush=True)
