# SPDX-License-Identifier: Apache-2.0
"""Policies, predictors and targets by name, and the rules of a recipe as plain JSON values and back.

A part is {"Name": {field: value}}, or "Name" alone. A value is null, a boolean, a number, a string, a list (a tuple
here), or an object with one key: {"dtype": "bfloat16"}, {"float": "inf"}, or the name of a class with its fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, TypeVar

import torch

from . import policies, predictors
from .files import FileError, FileKind, header, is_text
from .policies import Policy
from .predictors import Predictor
from .targets import spec
from .targets.spec import Target

Kind = TypeVar("Kind", bound=type)

BASES: dict[str, type] = {"when": Policy, "what": Predictor, "where": Target}


# Every class that a file may name, by the place where it stands; "value" is that of a field.
TABLE: dict[str, dict[str, type]] = {
    place: {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, BASES[place]) and kind is not BASES[place]
    }
    for place, module in (("when", policies), ("what", predictors), ("where", spec))
}
TABLE["value"] = {"Constant": predictors.Constant, "TimestepWeight": spec.TimestepWeight}


FORMAT, VERSION = "fastcache-recipe", 1
NEEDED = ("format", "version", "rules")
FILE = FileKind("recipe", "recipe.save(path)", depth=12)


FLOATS = {"inf": math.inf, "-inf": -math.inf}


def register_part(kind: Kind) -> Kind:
    """Let recipe files name a class of your own; also as a decorator above `@dataclass`.

    Args:
        kind: a dataclass: a policy, a predictor, a target, or a value of one of their fields.
    Returns:
        The class.
    Raises:
        TypeError: `kind` is no dataclass.
        ValueError: another class has its name.
    """
    if (
        not isinstance(kind, type)
        or not is_dataclass(kind)
        or "__dataclass_fields__" not in vars(kind)
    ):
        raise TypeError(f"register_part: kind is {kind!r}, must be a dataclass")
    place = next((p for p, base in BASES.items() if issubclass(kind, base)), "value")
    name = kind.__name__
    held = TABLE[place].get(name, kind)
    if (held.__module__, held.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"register_part: kind is named {name}, as {held.__module__}.{name} is; rename it"
        )
    TABLE[place][name] = kind
    return kind


def dtype_named(name: str) -> torch.dtype:
    """A torch dtype by name."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {name!r}, must be the name of a torch dtype such as bfloat16")
    return dtype


class Parts(Protocol):
    """A rule, as far as a file holds it."""

    @property
    def when(self) -> Policy: ...

    @property
    def what(self) -> Predictor: ...

    @property
    def where(self) -> Target: ...


# --- to JSON ---------------------------------------------------------------------------------------------


def rows_of(rules: Sequence[Parts], name: str) -> dict[str, Any]:
    """The object of a recipe file."""
    rows = [
        {
            place: _encoded_part(place, getattr(rule, place), f"recipe: rules[{i}].{place}")
            for place in BASES
        }
        for i, rule in enumerate(rules)
    ]
    return {"format": FORMAT, "version": VERSION, "name": name, "rules": rows}


def _encoded_part(place: str, part: Any, at: str) -> dict[str, Any]:
    """{"Name": {field: value}} of a policy, predictor or target. at: where it stands, for messages."""
    kind = type(part)
    if TABLE[place].get(kind.__name__) is not kind:
        raise FileError(
            f"{at} is a {kind.__name__}, which no file can name; call fastcache.register_part({kind.__name__})"
        )
    return {kind.__name__: _fields(part, at)}


def _fields(part: Any, at: str) -> dict[str, Any]:
    return {
        f.name: _encoded(getattr(part, f.name), f"{at}.{f.name}") for f in fields(part) if f.init
    }


def _encoded(value: Any, at: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return [_encoded(entry, at) for entry in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    name = type(value).__name__
    for place, known in TABLE.items():
        if known.get(name) is type(value):
            return _encoded_part(place, value, at)
    if callable(value):
        raise FileError(
            f"{at} is the callable {getattr(value, '__qualname__', name)}, which no file can hold; give a number"
        )
    raise FileError(f"{at} is a {name}, which no file can hold")


# --- from JSON -------------------------------------------------------------------------------------------


def rules_in(values: dict[str, Any]) -> tuple[str, list[tuple[tuple[Any, Any, Any], set[str]]]]:
    """The name in a recipe file's object, and per rule its parts and the fields that its policy is given."""
    header(FileError, "recipe", (values["format"], values["version"]), (FORMAT, VERSION))
    name, rows = values.get("name", "Recipe"), values["rules"]
    if not is_text(name):
        raise FileError("recipe: name must be a short string")
    if not isinstance(rows, list) or not rows:
        raise FileError("recipe: rules must be a list of at least one")
    found = []
    for i, row in enumerate(rows):
        at = f"recipe: rules[{i}]"
        if not isinstance(row, dict) or not {"when"} <= set(row) <= set(BASES):
            raise FileError(f"{at} must hold when, what and where")
        whole = {"what": "Reuse", "where": "Stack", **row}
        when, what, where = (_decoded_part(p, whole[p], f"{at}.{p}") for p in BASES)
        found.append(((when, what, where), set(_named(row["when"], at)[1])))
    return name, found


def _decoded_part(place: str, value: Any, at: str) -> Any:
    """The policy, predictor or target that a part of a file means. at: where it stands, for messages."""
    name, given = _named(value, at)
    kind = TABLE[place].get(name)
    if kind is None:
        raise FileError(f"{at} must name one of {', '.join(TABLE[place])}")
    return _built(kind, given, at)


def _named(value: Any, at: str) -> tuple[str, dict[str, Any]]:
    """The name and the fields of a part."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, given),) = value.items()
        if isinstance(given, Mapping):
            return name, dict(given)
    raise FileError(f'{at} must be a name or {{"name": {{fields}}}}')


def _built(kind: type, given: dict[str, Any], at: str) -> Any:
    known = [f.name for f in fields(kind) if f.init]
    if not known or set(given) <= set(known):
        values = {name: _decoded(value, f"{at}.{name}") for name, value in given.items()}
        try:
            return kind(**values)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            found = str(error)
        # the message quotes what came: of it only the name of the field is passed on
        wrong = next((n for n in known if found.startswith(f"{kind.__name__}: {n} ")), "a field")
        raise FileError(f"{at}: {wrong} is not valid for {kind.__name__}")
    raise FileError(f"{at}: {kind.__name__} has another field than {', '.join(known)}")


def _decoded(value: Any, at: str) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(entry, at) for entry in value)
    if not isinstance(value, dict):
        if isinstance(value, str) and not is_text(value):
            raise FileError(f"{at} is too long a string")
        return value
    name, content = next(iter(value.items())) if len(value) == 1 else ("", None)
    if name == "float" and isinstance(content, str) and content in FLOATS:
        return FLOATS[content]
    if name == "dtype" and isinstance(content, str):
        try:
            return dtype_named(content)
        except ValueError:
            name = ""
    for known in TABLE.values():
        if name in known and isinstance(content, dict):
            return _built(known[name], content, at)
    raise FileError(f"{at} must be a plain value, or an object with the name of a known class")
