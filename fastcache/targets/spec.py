"""Where to skip, as users write it. `bind.py` finds the modules that are meant. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import flag, identifiers, names_of, real, whole

FORMATS = ("BCFHW", "BFCHW", "BCHW", "BSC")


KINDS = ("attention", "self", "spatial", "temporal", "cross", "any")


FALLBACKS = (None, "attention", "blocks", "output")


@dataclass(frozen=True)
class Target:
    """A unit that can be skipped."""


@dataclass(frozen=True)
class Stack(Target):
    """The residual of all transformer blocks (after the first one, where the rule looks at that one)."""


@dataclass(frozen=True)
class Modules(Target):
    """Modules chosen by name, their outputs predicted.

    patterns: regular expressions of dotted names; None means the model's own of that kind.
    match: "search" anywhere in the name, or "full". kind: "attention", "spatial", "temporal" or "cross"
    keeps only attention modules of that kind, "self" those that do not declare themselves
    cross-attention; "any" takes every module.
    fallback: the patterns are a method's documented defaults: where they match nothing on this model, take
    its "attention" modules, "blocks" or "output" projection instead; None: nothing stands in.
    exclude: patterns of modules left out.
    """

    patterns: tuple[str, ...] | None = None
    match: str = "search"
    kind: str = "attention"
    fallback: str | None = None
    exclude: tuple[str, ...] = ()
    label: str = "modules"

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
        if self.patterns is None and self.kind == "any":
            raise ValueError(
                "Modules: patterns is None and kind is 'any'; say which modules with patterns=(...)"
            )


@dataclass(frozen=True)
class Guidance(Target):
    """The unconditional half of a batched guidance call.

    inputs: names of the inputs that hold both halves along dimension 0; None splits every tensor whose
    first dimension is the batch. tensor_format: layout of the model's output, "BCFHW", "BFCHW", "BCHW" or
    "BSC" for token sequences with `grid`. grid: (frames, height, width) or (height, width) of "BSC".
    low, high: callables (timestep) -> weight of the two frequency bands. compounding: the k-th skip in a
    row multiplies its weights k times, as diffusers 0.42.1 does. label: what errors call `inputs`.
    """

    inputs: tuple[str, ...] | None = None
    tensor_format: str = "BCFHW"
    grid: tuple[int, ...] | None = None
    low: object = None
    high: object = None
    compounding: bool = True
    label: str = "inputs"

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
