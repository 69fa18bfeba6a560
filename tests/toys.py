# SPDX-License-Identifier: Apache-2.0
"""Small models without diffusers, of every shape that the contract promises to take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastcache

DIM, TOKENS, TEXT, STEPS = 8, 6, 3, 10
RATIOS = [1.0, 1.3, 1.01, 0.99, 1.0, 1.02, 1.0, 0.98, 1.01, 1.0]
METHODS = ("first_block", "mag_cache", "taylor_seer", "pyramid", "faster", "faster_guided")


class Clock:
    """The timestep of the running step, for callbacks."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Attention(nn.Module):
    """Attention enough: mixes tokens, and has a usual class name."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        scores = self.to_q(hidden_states) @ other.transpose(1, 2) / math.sqrt(DIM)
        return self.to_out(scores.softmax(-1) @ other)


class Block(nn.Module):
    """hidden -> tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Attention(), nn.Linear(DIM, DIM)

    def change(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        text = 0.0 if encoder_hidden_states is None else encoder_hidden_states.mean(1, keepdim=True)
        return self.attn(hidden_states) + 0.3 * torch.tanh(self.ff(hidden_states + text))

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_states + scale * self.change(hidden_states)


class AnyName(Block):
    """The first argument has a name of its own."""

    def forward(self, latent: Tensor, temb: Any = None) -> Tensor:  # type: ignore[override]
        return latent + self.change(latent)


class InPlace(Block):
    """Writes its result into its input."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_states.add_(self.change(hidden_states.clone()))


class Single(Block):
    """A tuple of one."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor]:  # type: ignore
        return (hidden_states + self.change(hidden_states),)


class Dual(Block):
    """(hidden, encoder), text of its own length."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(DIM, DIM)

    def both(self, hidden: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
        drive = hidden.mean(1, keepdim=True)
        text = encoder + 0.3 * torch.tanh(self.text(encoder + drive))
        return hidden + self.change(hidden, encoder), text

    def forward(self, hidden_states, encoder_hidden_states, temb=None):  # type: ignore[override]
        return self.both(hidden_states, encoder_hidden_states)


class Turned(Dual):
    """(encoder, hidden)."""

    def forward(self, hidden_states, encoder_hidden_states, temb=None):  # type: ignore[override]
        return self.both(hidden_states, encoder_hidden_states)[::-1]


class Optional(Dual):
    """Takes text where there is some, returns hidden alone."""

    def forward(self, hidden_states, encoder_hidden_states=None):  # type: ignore[override]
        return hidden_states + self.change(hidden_states, encoder_hidden_states)


class Extra(Dual):
    """(hidden, encoder, weights, None)."""

    def forward(self, hidden_states, encoder_hidden_states, temb=None):  # type: ignore[override]
        weights = hidden_states.mean(-1)
        return (*self.both(hidden_states, encoder_hidden_states), weights, None)


class Model(nn.Module):
    """Blocks in lists of the given names, driven in one of several styles.

    streams: what a block returns. style: how it is called. walk: how the lists are gone through.
    """

    def __init__(
        self,
        block: type[Block] = Block,
        lists: tuple[str, ...] = ("blocks",),
        depth: int = 3,
        streams: str = "h",
        style: str = "keyword",
        walk: str = "iterate",
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.proj_out = nn.Linear(4, DIM), nn.Linear(DIM, 4)
        for name in lists:
            setattr(self, name, nn.ModuleList(block() for _ in range(depth)))
        self.lists, self.streams, self.style, self.walk = lists, streams, style, walk
        self.eval().requires_grad_(False)

    def _blocks(self) -> Any:
        for name in self.lists:
            modules = getattr(self, name)
            if self.walk == "index":
                for i in range(len(modules)):
                    yield modules[i]
            elif self.walk == "enumerate":
                for _, block in enumerate(modules):
                    yield block
            elif self.walk == "zip":
                for block, _ in zip(modules, range(len(modules)), strict=False):
                    yield block
            elif self.walk == "listed":
                yield from list(modules)
            elif self.walk == "slices":
                yield from modules[:1]
                yield from modules[1:]
            else:
                yield from modules

    def _call(self, block: nn.Module, hidden: Tensor, text: Tensor | None) -> Any:
        if self.style == "positional":
            return block(hidden) if text is None else block(hidden, text)
        given = {"hidden_states": hidden}
        if text is not None:
            given["encoder_hidden_states"] = text
        return block(**given)

    def through(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for block in self._blocks():
            out = self._call(block, hidden, text)
            if self.streams == "h":
                hidden = out
            elif self.streams == "(h)":
                (hidden,) = out
            elif self.streams == "eh":
                text, hidden = out
            else:
                hidden, text = out[:2]
        return hidden, text

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        hidden = self.embed(hidden_states)
        if timestep is not None:
            t = torch.as_tensor(timestep, dtype=hidden.dtype, device=hidden.device).reshape(-1)
            hidden = hidden + 0.1 * torch.sin(t / 300).reshape(-1, 1, 1)
        text = encoder_hidden_states
        hidden, text = self.through(hidden, text)
        if text is not None and "e" in self.streams:
            hidden = hidden + 0.5 * text.mean(1, keepdim=True)
        return self.proj_out(hidden)


# every shape of model that needs no adapter: name -> (model arguments, whether it is given text)
SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "tensor": ({}, False),
    "positional": ({"style": "positional"}, False),
    "other first argument": ({"block": AnyName, "style": "positional"}, False),
    "in place": ({"block": InPlace}, False),
    "tuple of one": ({"block": Single, "streams": "(h)"}, False),
    "(hidden, encoder)": ({"block": Dual, "streams": "he"}, True),
    "(encoder, hidden)": ({"block": Turned, "streams": "eh"}, True),
    "(encoder, hidden), positional": (
        {"block": Turned, "streams": "eh", "style": "positional"},
        True,
    ),
    "text optional, given": ({"block": Optional}, True),
    "text optional, left out": ({"block": Optional}, False),
    "extra returns": ({"block": Extra, "streams": "he"}, True),
    "two lists": ({"lists": ("transformer_blocks", "single_transformer_blocks")}, False),
    "three lists": ({"lists": ("blocks", "layers", "transformer_blocks"), "depth": 2}, False),
    "two lists of two streams": (
        {
            "block": Turned,
            "lists": ("transformer_blocks", "single_transformer_blocks"),
            "streams": "eh",
        },
        True,
    ),
    "by index": ({"walk": "index"}, False),
    "by index, two streams": ({"walk": "index", "block": Dual, "streams": "he"}, True),
    "enumerated": ({"walk": "enumerate"}, False),
    "zipped": ({"walk": "zip"}, False),
    "listed first": ({"walk": "listed"}, False),
    "sliced": ({"walk": "slices"}, False),
    "layers": ({"lists": ("layers",)}, False),
    "two blocks": ({"depth": 2}, False),
}  # fmt: skip


def model(shape: str = "tensor", seed: int = 0) -> Model:
    return Model(**SHAPES[shape][0], seed=seed)


def config(method: str, clock: Clock | None = None, **changes: Any) -> Any:
    """A config of each method that both computes and reuses on `run_inputs`."""
    clock = clock or Clock()
    settings: dict[str, Any] = {
        "first_block": {"threshold": 0.08},
        "mag_cache": {"mag_ratios": RATIOS, "num_inference_steps": STEPS, "threshold": 0.1},
        "taylor_seer": {
            "cache_interval": 3,
            "disable_cache_before_step": 2,
            "cache_identifiers": [r".*\.attn"],
            "taylor_factors_dtype": torch.float32,
        },
        "pyramid": {"spatial_attention_block_skip_range": 2, "current_timestep_callback": clock},
        "faster": {"is_guidance_distilled": True, "current_timestep_callback": clock},
        "faster_guided": {"tensor_format": "BCHW", "current_timestep_callback": clock},
    }[method]
    if method.startswith("faster"):
        settings["spatial_attention_block_identifiers"] = (r"\.attn",)
    kind = {
        "first_block": fastcache.FirstBlockCacheConfig,
        "mag_cache": fastcache.MagCacheConfig,
        "taylor_seer": fastcache.TaylorSeerCacheConfig,
        "pyramid": fastcache.PyramidAttentionBroadcastConfig,
    }.get(method, fastcache.FasterCacheConfig)
    return kind(**{**settings, **changes})


def inputs(
    steps: int = STEPS,
    seed: int = 0,
    text: bool = False,
    batch: int = 2,
    speed: float = 0.12,
    tokens: int = TOKENS,
) -> list[dict[str, Any]]:
    """A run: latents turn slowly while the timestep falls."""
    g = torch.Generator().manual_seed(seed)
    one = torch.randn(batch, tokens, 4, generator=g)
    two = torch.randn(batch, tokens, 4, generator=g)
    words = torch.randn(batch, TEXT, DIM, generator=g)
    calls = []
    for i in range(steps):
        angle = speed * i * (1 + 0.5 * math.sin(i + seed))
        call = {
            "hidden_states": math.cos(angle) * one + math.sin(angle) * two,
            "timestep": torch.full((batch,), 1000.0 * (1 - i / steps)),
        }
        if text:
            call["encoder_hidden_states"] = words.clone()
        calls.append(call)
    return calls


def step(target: nn.Module, call: dict[str, Any], clock: Clock | None = None) -> Tensor:
    if clock is not None:
        clock.now = float(torch.as_tensor(call["timestep"]).reshape(-1)[0])
    with torch.no_grad():
        return target(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()})


def run(
    cache: fastcache.Cache,
    target: nn.Module,
    calls: list[dict[str, Any]],
    clock: Clock | None = None,
    name: str = "default",
    **context: Any,
) -> list[Tensor]:
    """The outputs of a run, every call in a context of that name."""
    outputs = []
    for call in calls:
        if clock is not None:  # current when the context is entered
            clock.now = float(torch.as_tensor(call["timestep"]).reshape(-1)[0])
        with cache.context(name, **context):
            outputs.append(step(target, call))
    return outputs


def plain(target: nn.Module, calls: list[dict[str, Any]]) -> list[Tensor]:
    return [step(target, call) for call in calls]


def alone(
    build: Callable[[], nn.Module], method: str, calls: list[dict[str, Any]], **changes: Any
) -> list[Tensor]:
    """The outputs of a run that shares nothing with any other."""
    clock, target = Clock(), build()
    with fastcache.enable(target, config(method, clock, **changes)) as cache:
        return run(cache, target, calls, clock)


def actions(cache: fastcache.Cache) -> str:
    return "".join("C" if r.action == "compute" else "." for r in cache.stats)


def snapshot(target: nn.Module) -> dict[str, Any]:
    """What must be as before: class, attributes, hooks, children and state of every module."""
    seen: dict[str, Any] = {"": list(target.state_dict())}
    for name, module in target.named_modules():
        seen[name or "."] = (
            type(module),
            {
                k: (id(v), dict(v)) if isinstance(v, dict) else id(v)
                for k, v in vars(module).items()
            },
            [id(child) for child in module.children()],
        )
    return seen


class Picture(Model):
    """Latents as pictures [batch, 4, height, width], for the guidance half of FasterCache."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        tokens = hidden_states.flatten(2).transpose(1, 2)
        out = super().forward(tokens, timestep, encoder_hidden_states)
        return out.transpose(1, 2).reshape(hidden_states.shape)


def build(method: str, seed: int = 0) -> Model:
    """A model for a method: pictures and text for batched guidance, plain tokens otherwise."""
    if method == "faster_guided":
        return Picture(block=Optional, seed=seed)
    return Model(seed=seed)


def inputs_for(method: str, steps: int = STEPS, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    if method != "faster_guided":
        return inputs(steps, seed, **more)
    calls = inputs(steps, seed, text=True, batch=4, tokens=30, **more)
    for call in calls:  # [unconditional; conditional]: the same latents twice
        half = call["hidden_states"][:2].transpose(1, 2).reshape(2, 4, 6, 5)
        call["hidden_states"] = torch.cat([half, half])
    return calls
