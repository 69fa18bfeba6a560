# SPDX-License-Identifier: Apache-2.0
"""What a block is called with and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .adapter import ENCODER, HIDDEN, Block
from .modulation import Modulated, modulation_of
from .signatures import parameter_names
from .table import BLOCKS

Positions = tuple[int, int | None]  # of the image and the text stream in a returned tuple


def field_names(output: Any) -> tuple[str, ...]:
    """Names of the entries of a returned dict or dataclass; empty for anything else."""
    if isinstance(output, Mapping):
        return tuple(output)
    if dataclasses.is_dataclass(output):
        return tuple(field.name for field in dataclasses.fields(output))
    return ()


def entries(output: Any) -> Sequence[Any] | None:
    """What a block has returned, one after the other; None for a bare tensor."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple | list):
        return output
    if hasattr(output, "shape"):
        return None
    if isinstance(output, Mapping):
        return list(output.values())
    return [getattr(output, name) for name in field_names(output)] or None


class BlockIO:
    """Reads the streams of one block's call and return.

    The order of returns is the row's. Without one it is what a recording call has learnt, by which entry the
    model hands to the next block as what; else the entry of the same shape; else (hidden, encoder).
    """

    def __init__(self, block: Any, row: Block | None = None) -> None:
        known = row or next(
            (BLOCKS[b.__name__] for b in type(block).__mro__ if b.__name__ in BLOCKS), None
        )
        names = parameter_names(type(block).forward)
        known = known or Block()
        if not names and known.returns and known.hidden and known.encoder:
            # a block that takes whatever comes: in the order in which it returns them
            names = [known.hidden if r == HIDDEN else known.encoder for r in known.returns]
        self.name = type(block).__name__
        self.hidden = known.hidden or (
            "hidden_states" if "hidden_states" in names or not names else names[0]
        )
        self.encoder = known.encoder
        self.hidden_at = names.index(self.hidden) if self.hidden in names else 0
        self.encoder_at = names.index(self.encoder) if self.encoder in names else None
        self.returns = known.returns
        self.declared = declared(known.returns or ())
        self.names = names
        self.modulation = modulation_of(block, known.modulation, names)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """(hidden, encoder) of a call; encoder is None where the block takes none."""
        if self.hidden in kwargs:
            hidden = kwargs[self.hidden]
        elif len(args) > self.hidden_at:
            hidden = args[self.hidden_at]
        else:
            raise ValueError(
                f"{self.name}: its call has no {self.hidden!r}; declare the argument with "
                "fastcache.BlockAdapter(block=fastcache.Block(hidden=...))"
            )
        if self.encoder in kwargs:
            return hidden, kwargs[self.encoder]
        at = self.encoder_at
        return hidden, args[at] if at is not None and len(args) > at else None

    def modulated(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's normalised, timestep-modulated input, for this call."""
        assert self.modulation is not None
        return self.modulation.made(block, self.read(args, kwargs)[0], args, kwargs)

    def modulated_parts(
        self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Modulated | None:
        """The same by what makes it, for this call; None where the normalisation is another one."""
        assert self.modulation is not None
        return self.modulation.parts(block, self.read(args, kwargs)[0], args, kwargs)

    def positions(
        self, output: Any, hidden: Any, encoder: Any, learnt: Positions | None
    ) -> tuple[int | None, int | None]:
        """Where the image and the text stream are among the returned entries; (None, None) for a bare tensor.

        hidden, encoder: what the block was called with. learnt: places that a recording call has seen.
        """
        found = entries(output)
        if found is None:
            return None, None
        if found is not output and self.hidden in (names := field_names(output)):
            at = names.index(self.encoder) if self.encoder in names else None
            return names.index(self.hidden), at
        output = found
        if self.returns is not None:
            whole = len(output) >= len(self.returns)
            return self.declared if whole else declared(self.returns[: len(output)])
        if learnt is not None and max(learnt[0], learnt[1] or 0) < len(output):
            return learnt
        shaped = [i for i, v in enumerate(output) if getattr(v, "shape", None) == hidden.shape]
        texts = [
            i
            for i, v in enumerate(output)
            if encoder is not None and getattr(v, "shape", None) == encoder.shape
        ]
        first = shaped[0] if shaped else 0
        rest = [i for i in texts if i != first]
        return first, rest[0] if rest else None

    def streams(
        self, output: Any, hidden: Any, encoder: Any, learnt: Positions | None
    ) -> tuple[Any, Any]:
        """(hidden, encoder) as the block has returned them; text that it does not return is as it came."""
        known = self.returns
        if known is not None and type(output) is tuple and len(output) >= len(known):
            at, text = self.declared  # as below, in fewer calls: reused steps come here too
            return output[at], encoder if text is None else output[text]
        hidden_at, encoder_at = self.positions(output, hidden, encoder, learnt)
        if hidden_at is None:
            return output, encoder
        found: Any = entries(output)
        return found[hidden_at], encoder if encoder_at is None else found[encoder_at]

    def taken_apart(
        self, output: Any, hidden: Any, encoder: Any, learnt: Positions | None
    ) -> tuple[Any, Any, dict[int, Any]]:
        """(hidden, encoder, the other entries by place) of what the block has returned."""
        hidden_at, encoder_at = self.positions(output, hidden, encoder, learnt)
        if hidden_at is None:
            return output, encoder, {}
        found: Any = entries(output)
        text = None if encoder_at is None else found[encoder_at]
        return found[hidden_at], text, self.further(output, hidden, encoder, learnt)

    def further(
        self, output: Any, hidden: Any, encoder: Any, learnt: Positions | None
    ) -> dict[int, Any]:
        """By place, what a block has returned beside its streams."""
        streams = self.positions(output, hidden, encoder, learnt)
        if streams[0] is None:
            return {}
        return {i: v for i, v in enumerate(entries(output) or ()) if i not in streams}


# What a model's latents are called, whatever else comes first: by diffusers and in models' own code, in Cosmos 3 and in
# Film's decoder.
LATENTS = ("hidden_states", "x", "img", "vision_tokens", "decoder_input_tokens")


def model_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The latents among the arguments of a model's call, by their name, else what comes first."""
    for name in LATENTS:
        if name in kwargs:
            return kwargs[name]
    return args[0] if args else next(iter(kwargs.values()), None)


def declared(returns: Sequence[str]) -> Positions:
    """The places of the image and the text stream in a tuple of these."""
    at = {name: i for i, name in enumerate(returns)}
    return at.get(HIDDEN, 0), at.get(ENCODER)
