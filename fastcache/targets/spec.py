# SPDX-License-Identifier: Apache-2.0
"""Where to skip, as users write it. `bind.py` finds the modules that are meant. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from ..checks import flag, identifiers, interval_of, names_of, real, text, whole

Format = Literal["BCFHW", "BFCHW", "BCHW", "BSC"]
Kind = Literal["attention", "self", "spatial", "temporal", "cross", "any"]
Fallback = Literal["attention", "blocks", "output"]
FORMATS, KINDS, FALLBACKS = get_args(Format), get_args(Kind), (None, *get_args(Fallback))

# (module, timestep or None) -> weight of a frequency band, unitless
Band = Callable[[Any, "float | None"], float]


@dataclass(frozen=True)
class TimestepWeight:
    """A weight of a frequency band inside a timestep range, and 1 outside.

    Args:
        weight: unitless.
        timesteps: (lo, hi), the range, in the model's scale; both ends lie outside it.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or not lo < hi; the message names it.
    Source: FasterCache (arXiv 2410.19355), diffusers 0.42.1.
    """

    weight: float
    timesteps: tuple[float, float]

    def __post_init__(self) -> None:
        owner = "TimestepWeight"
        object.__setattr__(self, "weight", real(owner, "weight", self.weight))
        object.__setattr__(self, "timesteps", interval_of(owner, "timesteps", self.timesteps))

    def __call__(self, module: Any, timestep: float | None = None) -> float:
        lo, hi = self.timesteps
        return self.weight if timestep is not None and lo < timestep < hi else 1.0


@dataclass(frozen=True)
class Target:
    """What a rule skips, as users write it. A subclass describes one kind of part that a model can have.

    Class attributes: `scope` is the word by which it is bound (`register_target`); `halves` says that a
    reused step sees half of a guidance batch, so that the rule decides before the others; `excludes` has the
    scopes that make no sense beside it in a recipe, each with the reason.
    """

    scope: ClassVar[str]
    halves: ClassVar[bool] = False
    excludes: ClassVar[dict[str, str]] = {}

    @property
    def fallback(self) -> Fallback | None:
        """What stands in where a method's documented defaults match nothing; None: nothing, an error."""
        return None


_WHOLE = (
    "a Stack skips every block, so no second Stack and no Modules inside it can be combined with it; a "
    "Guidance target can"
)


_NOTHING_LEFT = (
    "an Output skips the whole model, so no second Output, no Stack and no Modules can be combined with it; a "
    "Guidance target can"
)


@dataclass(frozen=True)
class Stack(Target):
    """The residual of all transformer blocks, or of those after the first where the rule looks at it.

    Args:
        first, last: how many of the first and of the last blocks always run, counts, the block lists of a model
            being one; the blocks between are skipped. A rule that looks at the first block looks at what the first
            `first` make of their input; with 0 at the first one.
        normed: the residual reaches over the normalisation behind the last block, where `BlockAdapter(norm=...)`
            names one; it is not run on reused steps either. Nothing changes for models without one.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is negative, or blocks always run between the skipped ones and the normalisation; the
            message names it.
    Source: FirstBlockCache, MagCache and SeaCache of diffusers 0.42.1; Fn and Bn of cache-dit 1.5.3's DBCache.
    """

    first: int = 0
    last: int = 0
    normed: bool = False
    scope = "stack"
    excludes: ClassVar[dict[str, str]] = {"stack": _WHOLE, "modules": _WHOLE}

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            object.__setattr__(self, name, whole("Stack", name, getattr(self, name), 0))
        flag("Stack", "normed", self.normed)
        if self.normed and self.last:
            raise ValueError(
                f"Stack: normed is True, so no block may always run behind the skipped ones, and last is {self.last}; "
                "leave one of them out"
            )


@dataclass(frozen=True)
class Output(Target):
    """What the whole model returns; a reused step runs nothing of the model, its embedders included.

    Tensors of the input latents' shape are kept as their difference from these, others as they are.

    Source: EasyCache (arXiv 2507.02860).
    """

    scope = "output"
    excludes: ClassVar[dict[str, str]] = dict.fromkeys(
        ("output", "stack", "modules"), _NOTHING_LEFT
    )


@dataclass(frozen=True)
class Nothing(Target):
    """No part of the model: every step is computed, and nothing is kept. What the recipe "off" is made of."""

    scope = "nothing"


@dataclass(frozen=True)
class Modules(Target):
    """Modules chosen by name, their outputs predicted.

    Args:
        patterns: regular expressions of dotted names; None: all that the model has of that kind.
        match: "search" finds a pattern anywhere in the name, "full" matches the whole name.
        kind: "attention" keeps all attention modules, "spatial", "temporal" or "cross" those of that
            kind, "self" those that do not declare themselves cross-attention; "any" keeps every module.
        fallback: what stands in where the patterns, a method's documented defaults, match nothing: the
            "attention" modules, the "blocks" or the "output" projection; None: nothing, an error.
        exclude: regular expressions of modules that are left out, found anywhere in the name.
        label: what errors call `patterns`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is none of the words above or no regular expression, or nothing says which
            modules are meant; the message names it.
    Source: identifiers of Pyramid Attention Broadcast, FasterCache and TaylorSeer in diffusers 0.42.1.
    """

    patterns: tuple[str, ...] | None = None
    match: Literal["search", "full"] = "search"
    kind: Kind = "attention"
    fallback: Fallback | None = None
    exclude: tuple[str, ...] = ()
    label: str = "modules"
    scope = "modules"

    def __post_init__(self) -> None:
        if self.match not in ("search", "full"):
            raise ValueError(f"Modules: match is {self.match!r}, must be 'search' or 'full'")
        if self.kind not in KINDS:
            raise ValueError(f"Modules: kind is {self.kind!r}, must be one of {KINDS}")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"Modules: fallback is {self.fallback!r}, must be one of {FALLBACKS}")
        for name in ("patterns", "exclude"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, identifiers("Modules", name, value))
        text("Modules", "label", self.label)
        if self.patterns is None and self.kind == "any":
            raise ValueError(
                "Modules: patterns is None and kind is 'any'; say which modules with patterns=(...)"
            )


@dataclass(frozen=True)
class Guidance(Target):
    """The unconditional half of a batched guidance call.

    A skipped half is rebuilt from the conditional output and the last full difference of both halves,
    in two bands of spatial frequencies.

    Args:
        inputs: names of the inputs that hold both halves along dimension 0, the unconditional one
            first; None splits every tensor whose first dimension is the batch.
        tensor_format: layout of the model's output, "BCFHW", "BFCHW" or "BCHW", or "BSC" for token
            sequences [B, tokens, channels] laid out on `grid`.
        grid: (frames, height, width) or (height, width) of "BSC", in tokens.
        low, high: weights of the low and the high band, unitless: a number, or a callable
            (module, timestep) -> weight; None: 1.
        compounding: whether the k-th skip in a row applies its weight k times, as in diffusers.
        label: what errors call `inputs`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range or no known layout; the message names it.
    Source: FasterCache (arXiv 2410.19355), frequency split of diffusers 0.42.1.
    """

    inputs: tuple[str, ...] | None = None
    tensor_format: Format = "BCFHW"
    grid: tuple[int, ...] | None = None
    low: float | Band | None = None
    high: float | Band | None = None
    compounding: bool = True
    label: str = "inputs"
    scope = "guidance"
    halves = True
    excludes: ClassVar[dict[str, str]] = {"guidance": "only one Guidance target makes sense"}

    def __post_init__(self) -> None:
        if self.tensor_format not in FORMATS:
            raise ValueError(
                f"Guidance: tensor_format is {self.tensor_format!r}, must be one of {FORMATS}"
            )
        if self.inputs is not None:
            object.__setattr__(self, "inputs", names_of("Guidance", "inputs", self.inputs))
        if self.grid is not None:
            if isinstance(self.grid, str) or not isinstance(self.grid, Sequence):
                raise TypeError(f"Guidance: grid is {self.grid!r}, must be (frames, height, width)")
            if len(self.grid) not in (2, 3):
                raise ValueError(f"Guidance: grid is {self.grid!r}, must have two or three entries")
            sizes = tuple(whole("Guidance", "grid", size, 1) for size in self.grid)
            object.__setattr__(self, "grid", sizes)
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                object.__setattr__(self, name, real("Guidance", name, value))
        flag("Guidance", "compounding", self.compounding)
        text("Guidance", "label", self.label)
