# SPDX-License-Identifier: Apache-2.0
"""How the first block's input is normalised with the timestep in it, and what makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .signatures import parameter_names
from .table import ADALN, MODULATIONS


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


def reached(block: Any, path: str) -> Any:
    """What a dotted name means in a block; None where there is no such thing."""
    for name in path.split("."):
        block = getattr(block, name, None)
    return block


class Modulation:
    """One row of `MODULATIONS`, or of an adapter, on a block that is called with arguments of these names."""

    def __init__(self, block: Any, row: Sequence[str], names: Sequence[str]) -> None:
        self.attribute, *pairs = row
        norm = reached(block, self.attribute)
        taken = parameter_names(type(norm).forward) if norm is not None else []
        self.keyword = pairs[0]
        self.calls = self.keyword in taken  # the normalisation takes the conditioning itself
        self.pairs = []  # keyword, argument of the block, its place in a call, what of it
        for keyword, path in zip(pairs[::2], pairs[1::2], strict=True):
            argument, _, part = path.partition(".")
            at = names.index(argument) if argument in names else len(names)
            self.pairs.append((keyword, argument, at, part))
        # a table, a module of the block's or an argument that holds the rows has one pair
        ready = reached(block, self.keyword) is not None or self.keyword == pairs[1]
        told = set(pairs[::2]) <= set(taken) or (ready and len(self.pairs) == 1)
        given = all(argument in names for _, argument, _, _ in self.pairs) or not names
        self.fits = norm is not None and told and given

    def made(self, block: Any, hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The normalised, timestep-modulated input, for this call of the block."""
        norm, given = reached(block, self.attribute), self._given(args, kwargs)
        if self.calls:
            value = norm(hidden, **given)
            return value[0] if isinstance(value, tuple) else value
        shift, scale = self._tabled(block, hidden, given)
        return (norm(hidden.float()) * (1 + scale) + shift).type_as(hidden)

    def parts(
        self, block: Any, hidden: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Modulated | None:
        """The same by what makes it; None where the normalisation is another one."""
        norm, given = reached(block, self.attribute), self._given(args, kwargs)
        if hidden.dim() != 3:
            return None
        if not self.calls:
            if not plain_norm(norm, hidden.shape[-1]):
                return None
            shift, scale = self._tabled(block, hidden, given)
            return Modulated(hidden, scale, shift, norm.eps)
        known = type(norm).__name__ in ADALN and plain_norm(norm.norm, hidden.shape[-1])
        if not known:
            return None
        own = getattr(norm, "emb", None)  # embeds the timestep itself
        rows = given.get("emb") if own is None else own(**given)
        if rows is None:
            return None
        shift, scale = (
            norm.linear(norm.silu(rows))
            .unflatten(-1, (-1, hidden.shape[-1]))[:, None, :2]
            .unbind(-2)
        )
        return Modulated(hidden, scale, shift, norm.norm.eps)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the normalisation is conditioned on, by name."""
        given = {}
        for keyword, argument, at, part in self.pairs:
            value = kwargs[argument] if argument in kwargs else args[at]
            given[keyword] = getattr(value, part) if part else value
        return given

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


def modulation_of(block: Any, row: Sequence[str] | None, names: Sequence[str]) -> Modulation | None:
    """By the row of an adapter, else by the first of its classes' that fits; None where none does.

    A class may be built in several ways, or by another version.
    """
    if row is not None:
        return Modulation(block, row, names)
    rows = (r for b in type(block).__mro__ for r in MODULATIONS.get(b.__name__, ()))
    return next((m for r in rows if (m := Modulation(block, r, names)).fits), None)
