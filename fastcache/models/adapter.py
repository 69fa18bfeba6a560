"""What fastcache knows about models: class names as strings, argument names, order of returns. No torch.

A model without a row works when its blocks sit in a ModuleList under a usual name, take `hidden_states`
(or their first argument) and return a tensor or a tuple. A row is needed only where that is not so.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import flag, identifiers, names_of

HIDDEN, ENCODER = "hidden", "encoder"


@dataclass(frozen=True)
class Block:
    """How to talk to one class of block.

    hidden, encoder: argument names of the image and the text stream (encoder None: it has none).
    returns: order of the streams in the returned tuple; None finds it from shapes at the first call.
    modulation: the first normalisation with the timestep in it, as (attribute of the block, its keyword for
    the conditioning, argument of the block that holds that); None: not known. Where the block adds the
    conditioning to a table of its own, the table's name takes the keyword's place.
    """

    hidden: str | None = None
    encoder: str | None = "encoder_hidden_states"
    returns: tuple[str, ...] | None = None
    modulation: tuple[str, str, str] | None = None

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


@dataclass(frozen=True)
class BlockAdapter:
    """How to find and drive the blocks of one model class.

    blocks: attribute names of the block lists, in the order they run; None finds them by usual names.
    block: argument names and order of returns of its blocks. encoder_read: whether the text stream is
    read after the last block, so that a skipped step must give it too; None assumes it may be.
    attention: regular expressions of its attention modules. temporal: those that attend over time.
    """

    blocks: tuple[str, ...] | None = None
    block: Block | None = None
    encoder_read: bool | None = None
    attention: tuple[str, ...] | None = None
    temporal: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "attention", "temporal"):
            value = getattr(self, name)
            if value is None:
                continue
            check = names_of if name == "blocks" else identifiers
            object.__setattr__(self, name, check("BlockAdapter", name, value))
        if self.encoder_read is not None:
            flag("BlockAdapter", "encoder_read", self.encoder_read)
        if self.block is not None and not isinstance(self.block, Block):
            raise TypeError(
                f"BlockAdapter: block is {self.block!r}, must be a fastcache.adapters.Block"
            )
