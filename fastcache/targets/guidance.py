# SPDX-License-Identifier: Apache-2.0
"""Skipping the unconditional half of a batched guidance call.

On a full call both halves run and the difference between them is kept, split into a low and a high
frequency part as two real tensors. On a skipped call only the conditional half runs, and the other one is
rebuilt as a weighted sum: no Fourier transform, one launch. Exact, since the mask that splits the
spectrum is a linear projector symmetric in frequency.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..models.block_io import model_input
from ..models.signatures import parameter_names
from ..ops import direct
from ..policies import REUSE
from ..storage.allocate import allocate
from ..storage.group import SlotGroup
from ..storage.state import State
from .base import BoundTarget
from .decide import Part
from .frequency import low_pass
from .outputs import first_tensor, replace_first
from .spec import Guidance

_rebuild = direct("guidance_combine_")


# Inputs that say where tokens lie, the same for every sample: never halved, whatever their length. Lists of
# coordinates [tokens, axes] among them; with a batch of their own, [batch, tokens, axes], they are halved.
POSITIONS = re.compile(r"rope|rotary|indices")


COORDINATES = re.compile(r"(img|image|txt|text|video|audio)_ids$")


LAYERS_FIRST = ("encoder_hidden_states_llama3",)  # inputs of shape [layers, batch, ...]


class GuidanceSlots(SlotGroup):
    """low, high: both parts of the difference, float32. bands: the weights of a step, [2], for compiled code.
    held: the parts are those of a step that went well. products: of the weights, over the skips in a row."""

    __slots__ = ("bands", "held", "high", "low", "products")
    holds = ("low", "high", "bands")
    facts: ClassVar[dict[str, Any]] = {"held": False, "products": (1.0, 1.0)}
    low: Any
    high: Any
    bands: Any
    held: bool
    products: tuple[float, float]


class GuidanceTarget(BoundTarget):
    """The guidance batch of one model, bound to one rule of a recipe."""

    wraps = True
    one_batch = True
    own_slots = GuidanceSlots

    def __init__(self, part: Part, model: nn.Module, where: Guidance) -> None:
        super().__init__(part, weighted=False, halves=True)
        self.model, self.where = model, where
        self.bands = (1.0, 1.0)  # weights of the low and the high part in the running step
        self.names = parameter_names(type(model).forward)
        self.split: list[str] = []  # inputs cut in half at the last skipped call
        takes = inspect.signature(type(model).forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        if where.inputs is not None and not open_ended and not set(where.inputs) & set(takes):
            raise ValueError(
                f"target: {where.label} {list(where.inputs)} name no input of {type(model).__name__}; its "
                f"inputs are {list(takes)[1:]}"
            )

    def hooked(self) -> list[str]:
        return ["unconditional half of the guidance batch"]

    def begin(self) -> bool:
        """Work out the weights of this step, on the host."""
        if self.control.actions[self.rule] == REUSE:
            self._weigh()
        return self.recorded(self.control.state)

    def _weigh(self) -> None:
        control = self.control
        state: State = control.state
        self.bands = (self._band(self.where.low, state), self._band(self.where.high, state))
        if self.where.compounding:
            before = self._slots(state).products
            self.bands = (before[0] * self.bands[0], before[1] * self.bands[1])
        if control.may_be_compiled:
            self._slots(state).put("bands", self.bands)

    def _slots(self, state: State) -> GuidanceSlots:
        return state.slots[self.rule].own

    def commit(self, state: State, action: str) -> None:
        slots = self._slots(state)
        slots.held = True
        slots.products = self.bands if action == REUSE else (1.0, 1.0)

    def recorded(self, state: State) -> bool:
        """Whether storage exists."""
        return self._slots(state).low is not None

    def ready(self, state: State) -> bool:
        """Whether a difference to rebuild from is held."""
        return self._slots(state).held

    def refuse(self, names: set[str]) -> None:
        """Raise where a request's contexts say that the two halves come in calls of their own."""
        plain = {name.removeprefix("pred_") for name in names}  # as guiders of diffusers call them
        if "cond" in plain and any(name.startswith("uncond") for name in plain):
            raise ValueError(
                f"target: contexts {sorted(names)} say that guidance runs one call per branch, and the "
                "guidance half of FasterCache needs both in one batch [unconditional; conditional]; batch "
                "them, or use FasterCacheConfig(is_guidance_distilled=True) for its attention part alone"
            )

    def refuse_branch(self) -> None:
        raise ValueError(
            "target: the same latents came twice at one timestep, so guidance runs sequentially, and "
            "FasterCache's guidance half needs both halves in one batch; open cache.context('cond') "
            "and cache.context('uncond') around the calls, or set is_guidance_distilled=True"
        )

    def around(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on the full batch, or on its conditional half with the other one rebuilt."""
        slots = self._slots(self.control.state)
        if self.control.actions[self.rule] != REUSE:
            output = run(*args, **kwargs)
            value = first_tensor(output)
            if value.shape[0] % 2:
                raise ValueError(
                    f"target: FasterCache's guidance half needs a batch [unconditional; conditional], the output "
                    f"has batch {value.shape[0]}; run guidance batched, or leave the Guidance target out"
                )
            with torch.no_grad():
                self._refresh(slots, value.detach())
            return output
        args, kwargs = self._halved(args, kwargs, self._batch(args, kwargs))
        output = run(*args, **kwargs)
        value = first_tensor(output)
        if value.shape != slots.low.shape:
            raise ValueError(
                f"target: the conditional half has shape {tuple(value.shape)}, expected "
                f"{tuple(slots.low.shape)}; {self.where.label} does not name every input that holds both "
                f"halves, split were {self.split}"
            )
        with torch.no_grad():
            return replace_first(output, self._rebuilt(slots, value.detach()))

    def _rebuilt(self, slots: GuidanceSlots, cond: Tensor) -> Tensor:
        """[unconditional; conditional] from the conditional half."""
        if torch.compiler.is_compiling():
            low, high = slots.bands.unbind(0)
            uncond = cond.float() + low * slots.low + high * slots.high
            return torch.cat([uncond.to(cond.dtype), cond])
        both = cond.new_empty((2 * cond.shape[0], *cond.shape[1:]))
        _rebuild(both, cond, slots.low, slots.high, *self.bands)
        return both

    # --- inputs -------------------------------------------------------------------------------------------

    def _batch(self, args: tuple, kwargs: dict) -> int:
        first = model_input(args, kwargs)
        if not isinstance(first, Tensor):
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        return first.shape[0]

    def _halved(self, args: tuple, kwargs: dict, batch: int) -> tuple[tuple, dict]:
        """The second half of every input that holds the full batch along its first dimension."""
        self.split = []

        def half(value: Any, name: str) -> Any:
            if isinstance(value, Tensor):
                if name in LAYERS_FIRST and value.dim() > 1 and value.shape[1] == batch:
                    self.split.append(name)
                    return value[:, batch // 2 :]
                if value.dim() and value.shape[0] == batch:
                    self.split.append(name)
                    return value[batch // 2 :]
                return value
            if isinstance(value, dict):
                return {k: half(v, f"{name}.{k}") for k, v in value.items()}
            if isinstance(value, list | tuple):
                if len(value) == batch and all(
                    isinstance(v, Tensor | list | tuple | None.__class__) for v in value
                ):
                    self.split.append(name)
                    return type(value)(value[batch // 2 :])
                if any(isinstance(v, Tensor) for v in value):
                    return type(value)(half(v, name) for v in value)
            return value

        listed = self.where.inputs

        def take(value: Any, name: str, by_place: bool = False) -> Any:
            if listed is None:
                named = not _positions(value, name)
            else:  # upstream's rule: everything that comes by its place, and the keywords listed
                named = by_place or name in listed
            return half(value, name) if named else value

        names = [*self.names, *(f"argument {i}" for i in range(len(self.names), len(args)))]
        return (
            tuple(take(v, n, True) for v, n in zip(args, names, strict=False)),
            {k: take(v, k) for k, v in kwargs.items()},
        )

    # --- the difference -----------------------------------------------------------------------------------

    def _refresh(self, slots: GuidanceSlots, value: Tensor) -> None:
        """Keep the low and the high frequency part of unconditional - conditional."""
        uncond, cond = value.chunk(2)
        if not torch.compiler.is_compiling() and (
            slots.low is None or slots.low.shape != cond.shape
        ):
            slots.low = allocate(cond.shape, torch.float32, cond.device)
            slots.high = allocate(cond.shape, torch.float32, cond.device)
            slots.bands = allocate((2,), torch.float32, cond.device)
        difference = uncond.float() - cond.float()
        low = low_pass(difference, self.where)
        slots.low.copy_(low)
        slots.high.copy_(difference - low)

    def _band(self, weight: Any, state: State) -> float:
        if weight is None:
            return 1.0
        return float(weight(self.model, state.step_timestep)) if callable(weight) else float(weight)


def _positions(value: Any, name: str) -> bool:
    """Whether an input holds positions that all samples share."""
    if COORDINATES.search(name):
        return isinstance(value, Tensor) and value.dim() == 2
    return bool(POSITIONS.search(name))
