# SPDX-License-Identifier: Apache-2.0
"""Real diffusers pipelines of tiny random parts, offline, end to end: uncached, cached, compiled."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", minversion="0.36")

import tiny  # noqa: E402

import fastcache  # noqa: E402
from fastcache.models.attention import block_lists  # noqa: E402
from fastcache.models.registry import adapter_for  # noqa: E402

STEPS = 8
METHODS: dict[str, Callable[[Any], Any]] = {
    "FirstBlock": lambda pipe: fastcache.FirstBlockCacheConfig(0.5),
    "MagCache": lambda pipe: fastcache.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "TaylorSeer": lambda pipe: fastcache.TaylorSeerCacheConfig(cache_interval=3),
    "PAB": lambda pipe: fastcache.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(1, 950),
        current_timestep_callback=timestep_of(pipe),
    ),
    "FasterCache": lambda pipe: fastcache.FasterCacheConfig(
        is_guidance_distilled=True,
        spatial_attention_timestep_skip_range=(1, 950),
        current_timestep_callback=timestep_of(pipe),
    ),
}


def timestep_of(pipe: Any) -> Callable[[], Any] | None:
    """Most pipelines publish their timestep; their scheduler knows it too."""
    if hasattr(type(pipe), "current_timestep"):
        return None
    scheduler = pipe.scheduler
    return lambda: scheduler.timesteps[scheduler.step_index or 0]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose every matrix is random: some start as zero, and their blocks then add nothing."""
    torch.manual_seed(seed)
    model = make().eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0, 0.6 * (p.shape[0] / p.numel()) ** 0.5)
    return model


def denoiser(name: str, seed: int = 0, **override: Any) -> nn.Module:
    entry = tiny.ENTRIES[name]
    init = {
        k: tuple(v["__tuple__"]) if isinstance(v, dict) else v for k, v in entry["init"].items()
    }
    return seeded(lambda: getattr(diffusers, entry["class"])(**{**init, **override}), seed)


def image_vae(latent_channels: int) -> nn.Module:
    return seeded(
        lambda: diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
            scaling_factor=1.0,
        )
    )


def assemble(name: str, **parts: Any) -> Any:
    """A pipeline of these parts; all others are None."""
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    wanted = list(inspect.signature(kind.__init__).parameters)[1:]
    defaults = {k: p.default for k, p in inspect.signature(kind.__init__).parameters.items()}
    missing = {k: None for k in wanted if defaults[k] is inspect.Parameter.empty}
    pipe = kind(**{**missing, **{k: v for k, v in parts.items() if k in wanted}})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
FLUX_TEXT = {"prompt_embeds": noise(1, 6, 32, seed=1), "pooled_prompt_embeds": noise(1, 32, seed=2)}
FLUX_OTHER = {
    "negative_prompt_embeds": noise(1, 6, 32, seed=3),
    "negative_pooled_prompt_embeds": noise(1, 32, seed=4),
    "true_cfg_scale": 2.0,
}


def flux(kind: str = "FluxPipeline", **inputs: Any) -> tuple[Any, dict]:
    make = lambda: diffusers.FluxTransformer2DModel(**FLUX)  # noqa: E731
    pipe = assemble(kind, transformer=seeded(make), vae=image_vae(1), scheduler=euler())
    size = {"height": 16, "width": 16}
    return pipe, {**FLUX_TEXT, **size, "output_type": "pt", **inputs}


def flux_image(kind: str, **inputs: Any) -> tuple[Any, dict]:
    image = noise(1, 3, 16, 16, seed=5).clamp(0, 1)
    return flux(kind, image=image, **inputs)


def kontext() -> tuple[Any, dict]:
    return flux_image("FluxKontextPipeline", max_area=256, _auto_resize=False, **FLUX_OTHER)


def sd3() -> tuple[Any, dict]:
    make = functools.partial(denoiser, "SD3", num_layers=4)
    width, pooled = tiny_text("SD3")
    pipe = assemble(
        "StableDiffusion3Pipeline", transformer=make(), vae=image_vae(4), scheduler=euler()
    )
    text = {
        "prompt_embeds": noise(1, 6, width, seed=1),
        "pooled_prompt_embeds": noise(1, pooled, seed=2),
    }
    other = {
        "negative_prompt_embeds": noise(1, 6, width, seed=3),
        "negative_pooled_prompt_embeds": noise(1, pooled, seed=4),
    }
    return pipe, {**text, **other, "height": 16, "width": 16, "output_type": "pt"}


def tiny_text(name: str) -> tuple[int, int]:
    inputs = tiny.ENTRIES[name]["inputs"]
    pooled = inputs.get("pooled_projections", {"t": {"shape": [0]}})
    return inputs["encoder_hidden_states"]["t"]["shape"][-1], pooled["t"]["shape"][-1]


def video_text(name: str, tokens: int = 6) -> dict[str, Tensor]:
    width, _ = tiny_text(name)
    return {
        "prompt_embeds": noise(1, tokens, width, seed=1),
        "negative_prompt_embeds": noise(1, tokens, width, seed=3),
    }


WAN_VAE = {
    "base_dim": 3,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def wan(experts: int = 1) -> tuple[Any, dict]:
    make = functools.partial(denoiser, "Wan3D", num_layers=3)
    second = {"transformer_2": make(seed=1), "boundary_ratio": 0.6} if experts == 2 else {}
    vae = seeded(lambda: diffusers.AutoencoderKLWan(**WAN_VAE))
    pipe = assemble("WanPipeline", transformer=make(), vae=vae, scheduler=euler(), **second)
    size = {"height": 16, "width": 16, "num_frames": 5}
    return pipe, {**video_text("Wan3D"), **size, "output_type": "pt"}


def cogvideox() -> tuple[Any, dict]:
    vae = seeded(
        lambda: diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
    )
    model = denoiser("CogVideoX", num_layers=3)
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = assemble("CogVideoXPipeline", transformer=model, vae=vae, scheduler=scheduler)
    size = {"height": 16, "width": 16, "num_frames": 5}
    return pipe, {**video_text("CogVideoX", 8), **size, "output_type": "latent"}


def qwen() -> tuple[Any, dict]:
    model = denoiser("QwenImage", num_layers=3)
    pipe = assemble("QwenImagePipeline", transformer=model, vae=None, scheduler=euler())
    mask = {
        "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.int64),
        "negative_prompt_embeds_mask": torch.ones(1, 6, dtype=torch.int64),
    }
    size = {"height": 64, "width": 64}
    text = video_text("QwenImage")
    return pipe, {**text, **mask, **size, "true_cfg_scale": 2.0, "output_type": "latent"}


def ltx() -> tuple[Any, dict]:
    model = denoiser("LTX", num_layers=3)
    pipe = assemble("LTXPipeline", transformer=model, vae=None, scheduler=euler())
    mask = {
        "prompt_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "negative_prompt_attention_mask": torch.ones(1, 6, dtype=torch.bool),
    }
    size = {"height": 64, "width": 64, "num_frames": 9}
    return pipe, {**video_text("LTX"), **mask, **size, "output_type": "latent"}


# name: how to make it, and the contexts that its calls should end up in
PIPELINES: dict[str, tuple[Callable[[], tuple[Any, dict]], set[str]]] = {
    "Flux": (flux, {"cond"}),
    "Flux, true guidance": (lambda: flux(**FLUX_OTHER), {"cond", "uncond"}),
    "Flux img2img": (lambda: flux_image("FluxImg2ImgPipeline", strength=1.0), {"default"}),
    "Flux Kontext": (kontext, {"default", "default#2"}),
    "SD3": (sd3, {"default"}),
    "Wan": (wan, {"cond", "uncond"}),
    "Wan, two experts": (lambda: wan(2), {"cond", "uncond"}),
    "CogVideoX": (cogvideox, {"cond_uncond"}),
    "QwenImage": (qwen, {"cond", "uncond"}),
    "LTX": (ltx, {"cond_uncond"}),
}


def generate(pipe: Any, inputs: dict, **more: Any) -> Tensor:
    result = pipe(
        **inputs,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        **more,
    )[0]
    return result if isinstance(result, Tensor) else torch.as_tensor(result)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


class Interrupted(Exception):
    pass


def interrupt(pipe: Any, step: int, *rest: Any) -> dict:
    if step == STEPS // 2:
        raise Interrupted
    return {}


def raises(pipe: Any, inputs: dict) -> None:
    """A run that ends between two steps."""
    with pytest.raises(Interrupted):
        generate(pipe, inputs, callback_on_step_end=interrupt)


def stops(pipe: Any, inputs: dict) -> None:
    """A run whose later steps are left out, as a button in a user interface asks for."""

    def ask(pipe: Any, step: int, *rest: Any) -> dict:
        pipe._interrupt = step >= STEPS // 2
        return {}

    generate(pipe, inputs, callback_on_step_end=ask)


def strikes(pipe: Any, inputs: dict) -> None:
    """A run that ends inside the model: Ctrl-C in the second call of its first block."""
    calls = []

    def hook(module: nn.Module, args: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    _, blocks = block_lists(pipe.transformer, adapter_for(pipe.transformer))[0]
    handle = blocks[0].register_forward_pre_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, inputs)
    finally:
        handle.remove()


@pytest.fixture(scope="module", params=PIPELINES)
def made(request):
    torch.set_num_threads(1)  # this fixture runs before the one that does it for a test
    make, contexts = PIPELINES[request.param]
    with torch.no_grad():
        pipe, inputs = make()
        return pipe, inputs, contexts, generate(pipe, inputs)


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_runs_cached_repeats_itself_and_is_restored(made, method):
    pipe, inputs, contexts, uncached = made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with fastcache.enable(pipe, METHODS[method](pipe)) as cache:
            outputs = generate(pipe, inputs)
            records = list(cache.stats)
            for ends in (raises, stops, strikes):
                ends(pipe, inputs)
                assert same(generate(pipe, inputs), outputs), (
                    f"a run after one that {ends.__name__}"
                )
    assert {r.context for r in records} == contexts
    assert any("reuse" in r.actions for r in records)
    assert outputs.shape == uncached.shape and torch.isfinite(outputs).all()
    assert not same(outputs, uncached)
    assert same(generate(pipe, inputs), uncached)


def test_threshold_zero_is_bit_identical(made):
    pipe, inputs, _, uncached = made
    with fastcache.enable(pipe, fastcache.FirstBlockCacheConfig(0.0)):
        assert same(generate(pipe, inputs), uncached)


def guided(pipe: Any) -> Any:
    """FasterCache with its guidance half, for pipelines that batch both."""
    return fastcache.FasterCacheConfig(
        tensor_format="BFCHW",
        spatial_attention_timestep_skip_range=(1, 950),
        unconditional_batch_timestep_skip_range=(1, 950),
        unconditional_batch_skip_range=2,
    )


def test_the_unconditional_half_is_skipped_and_a_run_repeats_itself():
    pipe, inputs = cogvideox()
    uncached = generate(pipe, inputs)
    with fastcache.enable(pipe, guided(pipe)) as cache:
        outputs = generate(pipe, inputs)
        strikes(pipe, inputs)
        assert same(generate(pipe, inputs), outputs)
        assert any(r.actions[-1] == "reuse" for r in cache.stats)
    assert not same(outputs, uncached)


# --- compiled ------------------------------------------------------------------------------------

# tracing takes seconds: every pipeline once, every method at least once
COMPILED = {
    "Flux": "TaylorSeer",
    "Flux, true guidance": "FirstBlock",
    "Flux img2img": "MagCache",
    "Flux Kontext": "FirstBlock",
    "SD3": "PAB",
    "Wan": "FasterCache",
    "Wan, two experts": "FirstBlock",
    "CogVideoX": "guidance",
    "QwenImage": "FirstBlock",
    "LTX": "FirstBlock",
}


@contextlib.contextmanager
def compiled(pipe: Any) -> Iterator[None]:
    """The pipeline's denoisers replaced by compiled ones."""
    own = {n: m for n, m in pipe.components.items() if n.startswith("transformer") and m}
    try:
        for name, model in own.items():
            setattr(pipe, name, fastcache.compile(model, backend="eager"))
        yield
    finally:
        for name, model in own.items():
            setattr(pipe, name, model)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_compiled_pipeline_gives_the_same_bits(name):
    torch._dynamo.reset()
    pipe, inputs = PIPELINES[name][0]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = {**METHODS, "guidance": guided}[COMPILED[name]]
        with fastcache.enable(pipe, config(pipe)):
            outputs = generate(pipe, inputs)
            with compiled(pipe):
                assert same(generate(pipe, inputs), outputs)
                raises(pipe, inputs)
                assert same(generate(pipe, inputs), outputs), "after a run that raises"
            assert same(generate(pipe, inputs), outputs)
