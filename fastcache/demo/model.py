# SPDX-License-Identifier: Apache-2.0
"""The trained denoiser (diffusers' FluxTransformer2DModel) and its judge, loaded offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import require
from .data import CHANNELS, NUM_CLASSES, TEXT_DIM, encode_labels, position_ids

Loaded = TypeVar("Loaded", bound=nn.Module)

ASSETS = Path(__file__).parent / "assets"
MODEL_FILE = "flux_digits.safetensors"
JUDGE_FILE = "judge.safetensors"
RECORD_FILE = "training.json"

ARCHITECTURE: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}


class Judge(nn.Module):
    """A small digit classifier: images [B, 1, 16, 16] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 4 * 4, 64)
        self.head = nn.Linear(64, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer, [B, 64]."""
        x = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        hidden: Tensor = functional.relu(self.hidden(x.flatten(1)))
        return hidden

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(functional.dropout(self.features(images), 0.3, self.training))
        return logits


def build_model(seed: int = 0) -> nn.Module:
    """An untrained FluxTransformer2DModel with zeroed modulation and output layers, fp32."""
    require("diffusers")
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # diffusers ships no complete types
        model = cast(nn.Module, FluxTransformer2DModel(**ARCHITECTURE))
    zero_modulation(model)
    return model


def zero_modulation(model: nn.Module) -> None:
    """Start every block as the identity and the output at zero, which diffusers does not do."""
    for name, module in model.named_modules():
        modulates = name.endswith(".linear") and "norm" in name
        if modulates or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def load_model(path: Path | None = None) -> nn.Module:
    """The shipped checkpoint (stored in fp16) as an fp32 model in eval mode."""
    return loaded(build_model(), path or ASSETS / MODEL_FILE)


def load_judge(path: Path | None = None) -> Judge:
    """The shipped classifier in eval mode."""
    return loaded(Judge(), path or ASSETS / JUDGE_FILE)


def save_weights(module: nn.Module, path: Path) -> None:
    """Write `module`'s weights as fp16 safetensors."""
    require("safetensors")
    from safetensors.torch import save_file

    save_file({k: v.detach().half().contiguous() for k, v in module.state_dict().items()}, path)


def loaded(model: Loaded, path: Path, trainer: str = "fastcache.demo.train") -> Loaded:
    """A model with the weights that `save_weights` wrote, in fp32 and eval mode. trainer: what makes the file."""
    require("safetensors")
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; reinstall fastcache-dit or rebuild it with `python -m {trainer}`"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval().requires_grad_(False)


def denoise(model: nn.Module, tokens: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """Predicted velocity (noise - image): tokens [B, 64, 4], sigma [B] in [0, 1], labels [B]."""
    text, pooled = (t.to(tokens.dtype) for t in encode_labels(labels))
    return predicted(model, tokens, sigma, (text, pooled), position_ids())


def predicted(
    model: nn.Module,
    tokens: Tensor,
    sigma: Tensor,
    texts: tuple[Tensor, Tensor],  # of the tokens, and pooled
    ids: tuple[Tensor, Tensor],  # of the image and of the text
) -> Tensor:
    """What a Flux makes of tokens [B, T, C] at sigma [B]."""
    (text, pooled), (image_ids, text_ids) = texts, ids
    velocity: Tensor = model(
        hidden_states=tokens,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    return velocity
