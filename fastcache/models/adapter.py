# SPDX-License-Identifier: Apache-2.0
"""What fastcache knows about models: class names as strings, argument names, order of returns. No torch.

A model without a row works when its blocks sit in a ModuleList under a usual name, take `hidden_states`
(or their first argument) and return a tensor or a tuple. A row is needed only where that is not so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ..checks import flag, identifiers, names_of

Stream = Literal["hidden", "encoder"]
HIDDEN: Final = "hidden"
ENCODER: Final = "encoder"


@dataclass(frozen=True)
class Block:
    """How one class of block is called and what it returns.

    Args:
        hidden: name of the argument with the image stream [B, tokens, width]; None: `hidden_states`, or
            the first argument.
        encoder: name of the argument with the text stream [B, tokens, width]; None: there is none.
        returns: order of "hidden" and "encoder" in the returned tuple; None finds it at the first call.
        modulation: the first normalisation with the timestep in it, as (dotted name in the block, its
            keyword for the conditioning, argument of the block with the conditioning); None: not known. Further
            pairs of keyword and argument may follow. Where it takes no conditioning, the keyword's place is
            taken by the name of a table of the block that the conditioning is added to, or of a module that makes
            shift and scale of it; or by the argument's again, where that holds shift and scale. A dotted argument is
            an attribute of it.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: `returns` has other entries, or `modulation` an even or too small number of them.
    Source: the signatures of diffusers 0.42.1's block classes.
    """

    hidden: str | None = None
    encoder: str | None = "encoder_hidden_states"
    returns: tuple[Stream, ...] | None = None
    modulation: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "encoder"):
            value = getattr(self, name)
            if value is not None:
                names_of("Block", name, [value])
        if self.returns is not None:
            object.__setattr__(self, "returns", names_of("Block", "returns", self.returns))
            unknown = set(self.returns) - {HIDDEN, ENCODER}
            if unknown or HIDDEN not in self.returns:
                raise ValueError(
                    f"Block: returns is {self.returns!r}, must hold {HIDDEN!r} and may hold {ENCODER!r}"
                )
        if self.modulation is not None:
            names = names_of("Block", "modulation", self.modulation)
            if len(names) < 3 or len(names) % 2 == 0:
                raise ValueError(
                    f"Block: modulation is {names!r}, must be (attribute, keyword, argument), or with more pairs "
                    "of keyword and argument"
                )
            object.__setattr__(self, "modulation", names)


@dataclass(frozen=True)
class BlockAdapter:
    """How to find and drive the blocks of one model class.

    Args:
        blocks: dotted names of the block lists, in the order they run; None finds them by usual names.
        block: how its blocks are called; None looks their class up.
        encoder_read: whether the text stream is read after the last block, so that a skipped step must
            give it too; None assumes so.
        attention: regular expressions, searched in dotted names, of its attention modules; None finds
            them by class and name.
        temporal: regular expressions of those that attend over time; None goes by name.
        always_compute: names of arguments of the model; a call in which one of them is given (and not None)
            runs in full, such as one that writes a key/value cache of the model's own.
        norm: dotted name of the module that the image stream goes through right after the last block, which a
            `Stack(normed=True)` skips too; None: not known.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a pattern is no regular expression; the message names its field.
    Source: the rows for diffusers' models are in models/table.py.
    """

    blocks: tuple[str, ...] | None = None
    block: Block | None = None
    encoder_read: bool | None = None
    attention: tuple[str, ...] | None = None
    temporal: tuple[str, ...] | None = None
    always_compute: tuple[str, ...] = ()
    norm: str | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "attention", "temporal"):
            value = getattr(self, name)
            if value is None:
                continue
            check = names_of if name == "blocks" else identifiers
            object.__setattr__(self, name, check("BlockAdapter", name, value))
        object.__setattr__(
            self,
            "always_compute",
            names_of("BlockAdapter", "always_compute", self.always_compute)
            if self.always_compute
            else (),
        )
        if self.norm is not None:
            names_of("BlockAdapter", "norm", [self.norm])
        if self.encoder_read is not None:
            flag("BlockAdapter", "encoder_read", self.encoder_read)
        if self.block is not None and not isinstance(self.block, Block):
            raise TypeError(f"BlockAdapter: block is {self.block!r}, must be a fastcache.Block")
