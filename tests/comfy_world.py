# SPDX-License-Identifier: Apache-2.0
"""What stands for ComfyUI in tests: networks laid out as it names them, a model patcher and a sampler.

Written from the interface that MIT-licensed nodes document; nothing here is ComfyUI's.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

DIM, TOKENS, TEXT = 8, 6, 3


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"


class Mix(nn.Module):
    """Attention and modulation enough."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return x + 0.3 * torch.tanh(self.a(x) + self.b(x.mean(1, keepdim=True)) + vec[:, None])


class DoubleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(self, img, txt, vec, pe=None, attn_mask=None):
        both = self.mix(torch.cat((txt, img), 1), vec)
        return both[:, txt.shape[1] :], both[:, : txt.shape[1]]


class SingleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(self, x, vec, pe=None, attn_mask=None):
        return self.mix(x, vec)


class WanAttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(self, x, e, freqs, context, context_img_len=257):
        return self.mix(x, e + context.mean(1))


class QwenImageTransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask=None,
        temb=None,
        image_rotary_emb=None,
    ):
        both = self.mix(torch.cat((encoder_hidden_states, hidden_states), 1), temb)
        text = encoder_hidden_states.shape[1]
        return both[:, :text], both[:, text:]


class JointBlock(nn.Module):
    """Takes whatever comes; the last one returns no text."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.mix, self.last = Mix(), last

    def forward(self, *args, **kwargs):
        return self._mixed(*args, **kwargs)

    def _mixed(self, context, x, c):
        both = self.mix(torch.cat((context, x), 1), c)
        text = context.shape[1]
        return None if self.last else both[:, :text], both[:, text:]


class BasicTransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(self, x, context=None, attention_mask=None, timestep=None, pe=None):
        return self.mix(x, timestep + context.mean(1))


class Network(nn.Module):
    """A diffusion model: latents, timestep and context in, a prediction out."""

    def __init__(self, seed: int = 0, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.img_in, self.txt_in = nn.Linear(4, DIM), nn.Linear(DIM, DIM)
        self.time, self.final_layer = nn.Linear(1, DIM), nn.Linear(DIM, 4)
        self.make(depth)

    def forward(self, x, timestep, context, transformer_options=None, **kwargs):
        img, txt = self.img_in(x), self.txt_in(context)
        return self.final_layer(self.walk(img, txt, self.time(timestep[:, None])))


class Flux(Network):
    def make(self, depth):
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock() for _ in range(depth))

    def walk(self, img, txt, vec):
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=None)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=None)
        return img[:, txt.shape[1] :]


class HunyuanVideo(Flux):
    """The image comes first where both are joined."""

    def walk(self, img, txt, vec):
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=None, attn_mask=None)
        length = img.shape[1]
        img = torch.cat((img, txt), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=None, attn_mask=None)
        return img[:, :length]


class WanModel(Network):
    def make(self, depth):
        self.blocks = nn.ModuleList(WanAttentionBlock() for _ in range(depth))

    def walk(self, img, txt, vec):
        for block in self.blocks:
            img = block(img, e=vec, freqs=None, context=txt, context_img_len=None)
        return img


class QwenImageTransformer2DModel(Network):
    def make(self, depth):
        self.transformer_blocks = nn.ModuleList(QwenImageTransformerBlock() for _ in range(depth))

    def walk(self, img, txt, vec):
        for block in self.transformer_blocks:
            txt, img = block(
                hidden_states=img,
                encoder_hidden_states=txt,
                encoder_hidden_states_mask=None,
                temb=vec,
                image_rotary_emb=None,
            )
        return img


class MMDiT(Network):
    def make(self, depth):
        self.joint_blocks = nn.ModuleList(JointBlock(i == depth - 1) for i in range(depth))

    def walk(self, img, txt, vec):
        context, x = txt, img
        for block in self.joint_blocks:
            context, x = block(context, x, c=vec)
        return x


class LTXVModel(Network):
    def make(self, depth):
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock() for _ in range(depth))

    def walk(self, img, txt, vec):
        for block in self.transformer_blocks:
            img = block(img, context=txt, attention_mask=None, timestep=vec, pe=None)
        return img


LAYOUTS = {
    kind.__name__: kind
    for kind in (Flux, HunyuanVideo, WanModel, QwenImageTransformer2DModel, MMDiT, LTXVModel)
}


class Flow:
    """`model_sampling` of a flow model."""

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


class Patcher:
    """A model with patches of its own on a network that its clones share."""

    def __init__(self, network: nn.Module) -> None:
        self.objects = {"diffusion_model": network, "model_sampling": Flow()}
        self.model_options: dict = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list]] = {}

    def clone(self) -> Patcher:
        made = Patcher(self.objects["diffusion_model"])
        made.model_options = dict(self.model_options)
        made.wrappers = {k: {n: list(w) for n, w in v.items()} for k, v in self.wrappers.items()}
        return made

    def get_model_object(self, name: str):
        return self.objects[name]

    def set_model_unet_function_wrapper(self, wrapper) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def add_wrapper_with_key(self, kind: str, key: str, wrapper) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)


class Executor:
    """What a wrapper is given to call: the next one, and at last the original."""

    def __init__(self, original, wrappers) -> None:
        self.original, self.wrappers = original, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        first, *rest = self.wrappers
        return first(Executor(self.original, rest), *args, **kwargs)


def sigmas(steps: int) -> Tensor:
    return torch.linspace(1.0, 0.0, steps + 1)


class Guider:
    """Guidance by two conditions, in one batch or as two calls per step."""

    def __init__(self, patcher: Patcher, together: bool, areas: int = 1, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.patcher, self.together, self.areas = patcher, together, areas
        self.noise = torch.randn(1, TOKENS, 4, generator=g)
        self.conds = torch.randn(2, TEXT, DIM, generator=g)

    def call(self, x: Tensor, sigma: Tensor, which: list[int]) -> Tensor:
        """One call of the model, of the conditions `which`: 0 is the conditional one."""
        network = self.patcher.get_model_object("diffusion_model")
        given = {
            "input": torch.cat([x] * len(which)),
            "timestep": sigma.repeat(len(which)),
            "c": {
                "context": self.conds[which],
                "transformer_options": {"cond_or_uncond": which, "sigmas": sigma[None]},
            },
            "cond_or_uncond": which,
        }

        def apply_model(x, t, **c):
            return network(x, t, **c)

        wrapper = self.patcher.model_options.get("model_function_wrapper")
        if wrapper is not None:
            return wrapper(apply_model, given)
        return apply_model(given["input"], given["timestep"], **given["c"])

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.together:
            cond, uncond = self.call(x, sigma, [0, 1]).chunk(2)
        else:
            cond = torch.stack(
                [self.call(x * (1 - 0.2 * a), sigma, [0]) for a in range(self.areas)]
            )
            cond, uncond = cond.mean(0), self.call(x, sigma, [1])
        return uncond + 3.0 * (cond - uncond)

    def sampled(self, noise, latents, sampler, sigmas, *args, **kwargs) -> Tensor:
        x = noise
        for sigma, following in itertools.pairwise(sigmas):
            x = x + (following - sigma) * self.predict(x, sigma)
        return x

    def sample(self, steps: int = 12) -> Tensor:
        around = self.patcher.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
        wrappers = [w for found in around.values() for w in found]
        with torch.no_grad():
            run = Executor(self.sampled, wrappers)
            return run(self.noise, None, None, sigmas(steps), None, None)
