# SPDX-License-Identifier: Apache-2.0
"""Pipelines that people run, of tiny random parts, beyond those of test_pipelines.py; offline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import tiny
import torch
from test_pipelines import (
    FLUX,
    FLUX_OTHER,
    WAN_VAE,
    assemble,
    denoiser,
    euler,
    flux,
    image_vae,
    kontext,
    noise,
    sd3,
    seeded,
    video_text,
    wan,
)
from torch import Tensor, nn

Made = tuple[Any, dict[str, Any]]  # a pipeline, and what it is called with


def part(name: str, init: dict[str, Any], seed: int = 0) -> nn.Module:
    return seeded(lambda: getattr(diffusers, name)(**init), seed)


def image(size: int = 16) -> Tensor:
    return noise(1, 3, size, size, seed=5).clamp(0, 1)


def masks(shape: tuple[int, ...] = (1, 6), dtype: Any = torch.bool) -> dict[str, Tensor]:
    names = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return {n: torch.ones(shape, dtype=dtype) for n in names}


def text(width: int, tokens: int = 6) -> dict[str, Tensor]:
    return {
        "prompt_embeds": noise(1, tokens, width, seed=1),
        "negative_prompt_embeds": noise(1, tokens, width, seed=3),
    }


# --- images ---------------------------------------------------------------------------------------


def small(made: Made) -> Made:
    pipe, inputs = made
    return pipe, {**inputs, "height": 8, "width": 8}


def sd3_heun() -> Made:
    pipe, inputs = small(sd3())
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    return pipe, inputs


def sd3_skipped(*layers: int) -> Made:
    """Guidance by a model without some of its layers, in the middle of the run."""
    pipe, inputs = small(sd3())
    part_of_run = {"skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.9}
    return pipe, {**inputs, "skip_guidance_layers": list(layers), **part_of_run}


def lumina2(length: int = 6) -> Made:
    """length: of the negative prompt, padded to the same."""
    pipe = assemble(
        "Lumina2Pipeline", transformer=denoiser("Lumina2"), vae=image_vae(4), scheduler=euler()
    )
    mask = masks()
    mask["negative_prompt_attention_mask"][:, length:] = False
    return pipe, {**text(32), **mask, "height": 16, "width": 16}


def pixart() -> Made:
    init = tiny.ENTRIES["PixArt2D"]["init"]
    small = {"num_layers": 3, "caption_channels": 8, "cross_attention_dim": 4}
    small["num_embeds_ada_norm"] = 1000
    pipe = assemble(
        "PixArtSigmaPipeline",
        transformer=part("PixArtTransformer2DModel", {**init, **small}),
        vae=image_vae(4),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    size = {"height": 16, "width": 16, "use_resolution_binning": False}
    return pipe, {**text(8), **masks(), **size, "negative_prompt": None}


def sana() -> Made:
    init = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 8,
        "caption_channels": 8,
        "sample_size": 32,
    }
    model = part("SanaTransformer2DModel", init)
    pipe = assemble("SanaPipeline", transformer=model, vae=None, scheduler=euler())
    size = {"height": 256, "width": 256, "use_resolution_binning": False}
    return pipe, {**text(8), **masks(), **size, "negative_prompt": None}


def z_image() -> Made:
    init = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    }
    model = part("ZImageTransformer2DModel", init)
    pipe = assemble("ZImagePipeline", transformer=model, vae=image_vae(4), scheduler=euler())
    words = {n: [noise(6, 16, seed=i)] for i, n in enumerate(text(1))}
    return pipe, {**words, "height": 16, "width": 16}


def flux_control(start: float = 0.3) -> Made:
    pipe, inputs = flux("FluxPipeline")
    control = part("FluxControlNetModel", {**FLUX, "num_layers": 2, "num_single_layers": 3}, 1)
    made = assemble("FluxControlNetPipeline", **{**pipe.components, "controlnet": control})
    return made, {**inputs, "control_image": image(), "control_guidance_start": start}


def qwen_control(start: float = 0.3) -> Made:
    init = {**tiny.ENTRIES["QwenImage"]["init"], "num_layers": 3, "axes_dims_rope": (8, 4, 4)}
    del init["guidance_embeds"]
    model = denoiser("QwenImage", num_layers=3)
    control = part("QwenImageControlNetModel", init, 1)
    pipe = assemble(
        "QwenImageControlNetPipeline",
        transformer=model,
        controlnet=control,
        vae=part("AutoencoderKLQwenImage", WAN_VAE),
        scheduler=euler(),
    )
    mask = {f"{n}_mask": torch.ones(1, 6, dtype=torch.int64) for n in text(1)}
    given = {"control_image": image(32), "control_guidance_start": start, "true_cfg_scale": 2.0}
    return pipe, {**video_text("QwenImage"), **mask, **given, "height": 32, "width": 32}


def flux_adapted() -> Made:
    """Under adapters of PEFT, whose model takes whatever comes and passes it on."""
    from peft import LoraConfig, get_peft_model  # which takes a second, for one kind

    pipe, inputs = flux(**FLUX_OTHER)
    torch.manual_seed(0)
    low_rank = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.transformer = get_peft_model(pipe.transformer, low_rank)
    return pipe, inputs


# --- videos ---------------------------------------------------------------------------------------


def wan_video(experts: int = 1) -> Made:
    pipe, inputs = wan(experts)
    return pipe, inputs


def wan_image(experts: int = 1) -> Made:
    channels = 4 + 4 + 4  # latents, mask, picture
    make = functools.partial(denoiser, "Wan3D", num_layers=3, in_channels=channels)
    second = {"transformer_2": make(seed=1), "boundary_ratio": 0.6} if experts == 2 else {}
    vae = part("AutoencoderKLWan", WAN_VAE)
    name = "WanImageToVideoPipeline"
    pipe = assemble(name, transformer=make(), vae=vae, scheduler=euler(), **second)
    return pipe, {**video_text("Wan3D"), "image": image(), **VIDEO}


def wan_tokens(name: str) -> Made:
    """A timestep per token, as in Wan 2.2 TI2V; of a picture those of the first frame are 0."""
    vae = part("AutoencoderKLWan", WAN_VAE)
    model = denoiser("Wan3D", num_layers=3)
    pipe = assemble(name, transformer=model, vae=vae, scheduler=euler(), expand_timesteps=True)
    picture = {"image": image()} if "Image" in name else {}
    return pipe, {**video_text("Wan3D"), **picture, **VIDEO}


VIDEO = {"height": 16, "width": 16, "num_frames": 5}


def ltx_image() -> Made:
    vae = part(
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 4,
            "block_out_channels": (4, 4, 4, 4),
            "decoder_block_out_channels": (4, 4, 4, 4),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
    )
    model = denoiser("LTX", num_layers=3)
    pipe = assemble("LTXImageToVideoPipeline", transformer=model, vae=vae, scheduler=euler())
    size = {"height": 64, "width": 64, "num_frames": 17}
    return pipe, {**video_text("LTX"), **masks(), **size, "image": image(64)}


def skyreels(ar_step: int = 0, **more: Any) -> Made:
    """A long video in several clips, of which each goes on with the frames at the end of the one before."""
    pipe = assemble(
        "SkyReelsV2DiffusionForcingPipeline",
        transformer=denoiser("SkyReelsV2", num_layers=3),
        vae=part("AutoencoderKLWan", WAN_VAE),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    clips = {"num_frames": 21, "base_num_frames": 13, "overlap_history": 5, "ar_step": ar_step}
    size = {"height": 16, "width": 16, "prompt": None}
    return pipe, {**video_text("SkyReelsV2"), **size, **clips, **more}


def helios() -> Made:
    init = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_dim": (4, 4, 4),
    }
    pipe = assemble(
        "HeliosPipeline",
        transformer=part("HeliosTransformer3DModel", init),
        vae=part("AutoencoderKLWan", WAN_VAE),
        scheduler=euler(),
    )
    chunks = {"num_frames": 15, "num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}
    return pipe, {**text(16), "height": 16, "width": 16, **chunks}


KINDS: dict[str, Callable[[], Made]] = {
    "SD3": lambda: small(sd3()),
    "SD3, Heun": sd3_heun,
    "SD3, skipped layers": lambda: sd3_skipped(1, 2),
    "SD3, first layer skipped": lambda: sd3_skipped(0),
    "Lumina2": lumina2,
    "Lumina2, short prompt": lambda: lumina2(3),
    "PixArt": pixart,
    "Sana": sana,
    "Z-Image": z_image,
    "Flux": flux,
    "Flux Kontext": kontext,
    "Flux, adapted": flux_adapted,
    "Flux, ControlNet": lambda: flux_control(0.0),
    "Flux, late ControlNet": flux_control,
    "QwenImage, ControlNet": lambda: qwen_control(0.0),
    "QwenImage, late ControlNet": qwen_control,
    "Wan": wan_video,
    "Wan, two experts": lambda: wan_video(2),
    "Wan, tokens": lambda: wan_tokens("WanPipeline"),
    "Wan image": wan_image,
    "Wan image, two experts": lambda: wan_image(2),
    "Wan image, tokens": lambda: wan_tokens("WanImageToVideoPipeline"),
    "LTX image": ltx_image,
    "SkyReels": skyreels,
    "SkyReels, staggered": lambda: skyreels(2),
    "Helios": helios,
}
