# SPDX-License-Identifier: Apache-2.0
"""Public docstrings: every argument, result and error of every public name is described."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest

import fastcache
from fastcache import checks, ops
from fastcache.configs import CONFIGS

SECTIONS = ("Args:", "Returns:", "Raises:", "Source:")
CHECKS = {name for name, _ in inspect.getmembers(checks, inspect.isfunction)}
CHECKS |= {"checked_ratios", "ratio_list", "validate"}  # which raise for those who call them
CHECKS |= {"check", "check_out", "check_samples"}  # of ops


def public() -> Iterator[tuple[str, Any]]:
    """Public classes and functions, and the public methods and properties that the classes define."""
    for name in ops.__all__:
        yield f"ops.{name}", getattr(ops, name)
    for name in fastcache.__all__:
        thing = getattr(fastcache, name)
        if isinstance(thing, ModuleType) or not callable(thing):
            continue
        yield name, thing
        if not inspect.isclass(thing):
            continue
        for base in thing.__mro__:
            if not base.__module__.startswith("fastcache"):
                continue
            for key in vars(base):
                member = inspect.getattr_static(thing, key)  # a field may have taken its place
                described = isinstance(member, property | classmethod)
                if not key.startswith("_") and (described or inspect.isfunction(member)):
                    yield f"{name}.{key}", member


PUBLIC = dict(public())


def function_of(thing: Any) -> Any:
    if isinstance(thing, property):
        return thing.fget
    return inspect.unwrap(getattr(thing, "__func__", thing))


def text_of(name: str, thing: Any) -> str:
    """The docstring; a method without one takes that of the base which declares it."""
    if "." in name and not name.startswith("ops."):
        owner, key = name.split(".")
        return inspect.getdoc(getattr(getattr(fastcache, owner), key)) or text_up(owner, key)
    return inspect.cleandoc(thing.__doc__ or "")


def text_up(owner: str, key: str) -> str:
    for base in getattr(fastcache, owner).__mro__[1:]:
        member = vars(base).get(key)
        if member is not None and member.__doc__:
            return inspect.cleandoc(member.__doc__)
    return ""


def sections(text: str) -> dict[str, str]:
    """The text under each heading."""
    parts = re.split(rf"^({'|'.join(SECTIONS)})", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parameters(thing: Any) -> list[str]:
    if isinstance(thing, property):
        return []
    if dataclasses.is_dataclass(thing) and thing.__dataclass_params__.init:
        return [field.name for field in dataclasses.fields(thing)]
    if inspect.isclass(thing) and issubclass(thing, tuple):
        return list(thing._fields)
    return signature(thing)


def signature(thing: Any) -> list[str]:
    thing = thing if inspect.isclass(thing) else function_of(thing)
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return []
    return [n for n in inspect.signature(thing).parameters if n not in ("self", "cls")]


def named(args: str) -> set[str]:
    """Names that an Args section describes: `one: ...` or `one, two: ...` at its first indent."""
    found: set[str] = set()
    for line in re.findall(r"^    (\w[\w, *]*):", args, re.MULTILINE):
        found |= {name.strip(" *") for name in line.split(",")}
    return found


@cache
def raising(function: Any) -> bool:
    """Whether a function's own source raises, or checks an argument."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise):
            return "NotImplementedError" not in ast.unparse(node)
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in CHECKS:
                return True
    return False


def raises(thing: Any) -> bool:
    if not inspect.isclass(thing):
        return raising(function_of(thing))
    written = (vars(base).get(n) for base in thing.__mro__ for n in ("__init__", "__post_init__"))
    return any(
        raising(f)
        for f in written
        if inspect.isfunction(f)
        and f.__code__.co_filename.endswith(".py")
        and "fastcache" in f.__module__
    )


def returns(thing: Any) -> bool:
    if inspect.isclass(thing) or isinstance(thing, property):
        return False
    return inspect.signature(function_of(thing)).return_annotation not in ("None", None)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_described(name):
    text = text_of(name, PUBLIC[name])
    assert text and text.split("\n")[0].rstrip().endswith((".", ":")), f"{name}: {text[:80]!r}"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_named(name):
    wanted = set(parameters(PUBLIC[name]))
    found = named(sections(text_of(name, PUBLIC[name])).get("Args:", ""))
    assert wanted <= found, f"{name}: Args lacks {sorted(wanted - found)}"
    assert found <= wanted, f"{name}: Args has {sorted(found - wanted)}, which it does not take"


@pytest.mark.parametrize("name", [n for n in PUBLIC if returns(PUBLIC[n])])
def test_what_is_returned_is_described(name):
    text = text_of(name, PUBLIC[name])
    short = not signature(PUBLIC[name]) and len(text.split("\n")) == 1  # the sentence says it
    assert short or sections(text).get("Returns:", "").strip(), name


@pytest.mark.parametrize("name", [n for n in PUBLIC if raises(PUBLIC[n])])
def test_errors_are_described(name):
    assert re.findall(
        r"^    \w+(?:, \w+)*: \S", sections(text_of(name, PUBLIC[name])).get("Raises:", ""), re.M
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_only_errors_that_exist_are_named(name):
    listed = sections(text_of(name, PUBLIC[name])).get("Raises:", "")
    for error in re.findall(r"\w+", " ".join(re.findall(r"^    (\w+(?:, \w+)*):", listed, re.M))):
        kind = getattr(fastcache, error, None) or getattr(__import__("builtins"), error, None)
        assert isinstance(kind, type) and issubclass(kind, Exception), f"{name}: {error}"


METHODS = [
    name
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing)
    and (
        name in CONFIGS
        or (
            issubclass(thing, fastcache.Policy | fastcache.Predictor)
            and thing.__mro__[1] is not object
        )
    )
]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_source(name):
    source = sections(text_of(name, PUBLIC[name])).get("Source:", "")
    assert re.search(r"arXiv \d{4}\.\d{5}|diffusers \d|cache-dit \d|ours", source), name


def test_there_is_something_to_read():
    assert {"Recipe.plan", "Recipe.of", "FirstBlock", "Calibration.load", "calibrate"} <= set(
        PUBLIC
    )
    assert len(PUBLIC) > 80 and len(METHODS) > 15
    assert raises(fastcache.FirstBlock) and not raises(fastcache.Reuse)
    assert {"Cache.context", "Cache.summary", "Stats.last_run", "Record", "enable"} <= set(PUBLIC)
