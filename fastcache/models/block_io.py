# SPDX-License-Identifier: Apache-2.0
"""What a block is called with and what it returns."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .adapter import ENCODER, HIDDEN, Block
from .table import ADALN, BLOCKS, MODULATIONS

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time")  # of a model's argument

Positions = tuple[int, int | None]  # of the image and the text stream in a returned tuple


class Modulated(NamedTuple):
    """A modulated input by what makes it: LN(hidden) * (1 + scale) + shift, the modulations [B, 1 or T, C]."""

    hidden: Any
    scale: Any
    shift: Any
    eps: float


def plain_norm(norm: Any, width: int) -> bool:
    """Whether it is a LayerNorm over the last dimension, without weights of its own."""
    sizes = getattr(norm, "normalized_shape", None)
    weightless = hasattr(norm, "bias") and norm.weight is None and norm.bias is None
    return sizes == (width,) and weightless


def rows_of(x: Any, table: Any, given: Any) -> tuple[Any, Any]:
    """(shift, scale) of x [B, ..., D], with dimensions of 1 where all tokens of a sample share them.

    given: rows shift, scale, ... of [B, n, D], or with rows per token [B, S, n, D], or [B, n, S, D] where S is not n;
    or any with the rows in one. table: [n, D] or [1, n, D], added to it; 0 for none.
    """
    width = x.shape[-1]
    rows = given.float()
    if rows.shape[-1] != width:
        rows = rows.unflatten(-1, (-1, width))
    n = table.shape[-2] if hasattr(table, "shape") else rows.shape[-2]
    if rows.shape[-2] != n and rows.dim() == 4:  # SkyReels-V2 has the tokens last, Wan 2.2 the rows
        rows = rows.transpose(1, 2)
    shift, scale = (table + rows).unbind(-2)[:2]
    while shift.dim() < x.dim():  # one modulation for all tokens of a sample
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return shift, scale


def present(block: Any, name: str, table: Any, like: Any) -> Any:
    """A table of a block on the device of `like`, also where it is offloaded until the block runs.

    accelerate's hook keeps what it has taken away by name, and leaves an empty tensor on the meta device.
    """
    if table.device == like.device:
        return table
    if table.device.type == "meta":
        weights = getattr(getattr(block, "_hf_hook", None), "weights_map", None)
        if weights is None:
            raise ValueError(
                f"what: Guided(guide='modulated') reads {name!r} of {type(block).__name__}, which is offloaded to "
                "nobody knows where; use guide='residual' or 'input'"
            )
        table = weights[name]
    return table.to(like.device)


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


def reached(block: Any, path: str) -> Any:
    """What a dotted name means in a block; None where there is no such thing."""
    for name in path.split("."):
        block = getattr(block, name, None)
    return block


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
        self.modulation = known.modulation or next(
            (MODULATIONS[b.__name__] for b in type(block).__mro__ if b.__name__ in MODULATIONS),
            None,
        )
        self.calls = False  # the normalisation takes the conditioning itself
        if self.modulation is not None:
            norm, keyword = reached(block, self.modulation[0]), self.modulation[1]
            self.calls = (
                keyword in parameter_names(type(norm).forward) if norm is not None else False
            )
            told = (
                self.calls or reached(block, keyword) is not None or keyword == self.modulation[2]
            )
            given = all(argument in names for argument in self.modulation[2::2]) or not names
            if known.modulation is None and not (norm is not None and told and given):
                self.modulation = (
                    None  # of a class that is built in several ways, or by another version
                )

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
        hidden, norm, given = self._conditioned(block, args, kwargs)
        if self.calls:
            value = norm(hidden, **given)
            return value[0] if isinstance(value, tuple) else value
        shift, scale = self._tabled(block, hidden, given)
        return (norm(hidden.float()) * (1 + scale) + shift).type_as(hidden)

    def modulated_parts(
        self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Modulated | None:
        """The same by what makes it, for this call; None where the normalisation is another one."""
        hidden, norm, given = self._conditioned(block, args, kwargs)
        if not self.calls:
            if hidden.dim() != 3 or not plain_norm(norm, hidden.shape[-1]):
                return None
            shift, scale = self._tabled(block, hidden, given)
            return Modulated(hidden, scale, shift, norm.eps)
        rows = given.get("emb")
        known = type(norm).__name__ in ADALN and getattr(norm, "emb", None) is None
        if rows is None or not known or hidden.dim() != 3:
            return None
        if not plain_norm(norm.norm, hidden.shape[-1]):
            return None
        shift, scale = (
            norm.linear(norm.silu(rows))
            .unflatten(-1, (-1, hidden.shape[-1]))[:, None, :2]
            .unbind(-2)
        )
        return Modulated(hidden, scale, shift, norm.norm.eps)

    def _conditioned(
        self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """The hidden states of a call, the module that normalises them, and what that is conditioned on, by name."""
        attribute, *pairs = self.modulation or ()
        given = {
            name: kwargs[argument] if argument in kwargs else args[self.names.index(argument)]
            for name, argument in zip(pairs[::2], pairs[1::2], strict=True)
        }
        return self.read(args, kwargs)[0], reached(block, attribute), given

    def _tabled(self, block: Any, hidden: Any, given: dict[str, Any]) -> tuple[Any, Any]:
        """(shift, scale) where a table of the block, or a module of it, makes them."""
        ((keyword, rows),) = given.items()
        table: Any = reached(block, keyword)
        if table is None:
            table = 0
        elif callable(table):
            table, rows = 0, table(rows)
        else:
            table = present(block, keyword, table, hidden)
        return rows_of(hidden, table, rows)

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


def model_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The latents among the arguments of a model's call: `hidden_states`, else what comes first."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return args[0] if args else next(iter(kwargs.values()), None)


def declared(returns: Sequence[str]) -> Positions:
    """The places of the image and the text stream in a tuple of these."""
    at = {name: i for i, name in enumerate(returns)}
    return at.get(HIDDEN, 0), at.get(ENCODER)


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters after `self`; empty where the signature tells nothing."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def timed_forward(model: Any) -> Callable[..., Any]:
    """The forward that names the model's arguments: its own, or that of what a wrapper passes them on to."""
    own: Callable[..., Any] = type(model).forward
    if parameter_names(own):
        return own
    for module in model.modules():
        names = parameter_names(type(module).forward)
        if any(n in names for n in TIMESTEP_NAMES):
            named: Callable[..., Any] = type(module).forward
            return named
    return own
