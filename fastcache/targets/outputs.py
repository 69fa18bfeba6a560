# SPDX-License-Identifier: Apache-2.0
"""How blocks and modules return their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..models.block_io import entries, field_names


def container(kind: Any, names: tuple[str, ...], values: list[Any]) -> Any:
    """A dict or dataclass with these entries, or a named tuple, which goes by place."""
    if not names:
        return kind._make(values)
    found = dict(zip(names, values, strict=True))
    return kind(**found) if hasattr(kind, "__dataclass_fields__") else kind(found)


def first_value(output: Any) -> Any:
    """What a model's output is about: itself, element 0, or its first field."""
    if isinstance(output, tuple | list):
        return output[0]
    if isinstance(output, Tensor):
        return output
    return output["sample"] if "sample" in output else next(iter(output.values()))


def first_tensor(output: Any) -> Tensor:
    """The tensor of a model's output."""
    value = first_value(output)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"target: FasterCache's guidance half needs one batched output tensor, the model returns a "
            f"{type(value).__name__}; use FasterCacheConfig(is_guidance_distilled=True) for its attention part"
        )
    return value


def replace_first(output: Any, value: Tensor) -> Any:
    """The same container with its tensor replaced."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple | list):
        return type(output)((value, *output[1:]))
    key = "sample" if "sample" in output else next(iter(output))
    output[key] = value
    return output


def template_of(output: Any) -> Any:
    """How a module returns its tensors: None for a bare one, tuple or list where they are all it holds, else
    the leaves and their tree."""
    if isinstance(output, Tensor):
        return None
    if type(output) in (tuple, list) and all(isinstance(v, Tensor) for v in output):
        return type(output)
    leaves, spec = tree_flatten(output)
    return [Tensor if isinstance(v, Tensor) else v for v in leaves], spec


def tensors(template: Any, output: Any) -> Any:
    """The tensors of what a module has returned, in order."""
    if template is None:
        return (output,)
    if type(output) is template:
        return output
    return [v for v in tree_flatten(output)[0] if isinstance(v, Tensor)]


def rebuilt(template: Any, values: list[Tensor]) -> Any:
    """These tensors as a module returns them."""
    if template is None:
        return values[0]
    if template is tuple:
        return tuple(values)
    if template is list:
        return values
    leaves, spec = template
    found = iter(values)
    return tree_unflatten([next(found) if leaf is Tensor else leaf for leaf in leaves], spec)


@dataclass(frozen=True)
class ReturnLayout:
    """How a block's return is built: a bare tensor, or a container with the streams at these places.

    names: of the entries, where the container is a dict or a dataclass.
    """

    kind: type | None = None  # None: bare tensor
    length: int = 0
    hidden: int | None = None
    encoder: int | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, output: Any, hidden: int | None, encoder: int | None) -> ReturnLayout:
        """The layout of what a block has returned, its streams lying at these places."""
        if hidden is None:
            return cls()
        found, names = entries(output), field_names(output)
        assert found is not None
        kind = type(output)
        if not names and not hasattr(kind, "_make"):
            kind = list if isinstance(output, list) else tuple
        return cls(kind, len(found), hidden, encoder, names)

    def build(self, hidden: Any, encoder: Any, extra: dict[int, Any]) -> Any:
        kind: Any = self.kind
        if kind is None:
            return hidden
        if kind is tuple and self.length == 2 and not extra:  # as most blocks do
            text = None if self.encoder is None else encoder
            return (text, hidden) if self.hidden else (hidden, text)
        values: list[Any] = [None] * self.length
        for i, value in extra.items():
            values[i] = value
        values[self.hidden or 0] = hidden
        if self.encoder is not None:
            values[self.encoder] = encoder
        if kind is tuple or kind is list:
            return tuple(values) if kind is tuple else values
        return container(kind, self.names, values)

    @property
    def further(self) -> bool:
        """Whether something comes beside the streams."""
        return self.length > 1 + (self.encoder is not None)


BARE = ReturnLayout()


@dataclass(frozen=True)
class Entries:
    """What a block returns beside its streams, by place: the tensors in it are kept apart, the rest as it was seen.

    at: numbers of the tensors among all leaves. tree: how the leaves lie. rest: the leaves, where no tensors are.
    """

    at: tuple[int, ...]
    tree: Any
    rest: tuple[Any, ...] = field(compare=False)

    @classmethod
    def of(cls, extra: dict[int, Any]) -> Entries:
        leaves, tree = tree_flatten(extra)
        at = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(at, tree, rest)

    def tensors(self, extra: dict[int, Any]) -> list[Tensor]:
        """The tensors of other entries of this form."""
        if not self.at:
            return []
        leaves = tree_flatten(extra)[0]
        return [leaves[i] for i in self.at]

    def build(self, values: Sequence[Tensor]) -> dict[int, Any]:
        """The entries with these tensors in them."""
        leaves = list(self.rest)
        for i, value in zip(self.at, values, strict=True):
            leaves[i] = value
        found: dict[int, Any] = tree_unflatten(leaves, self.tree)
        return found
