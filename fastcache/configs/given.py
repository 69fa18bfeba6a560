# SPDX-License-Identifier: Apache-2.0
"""From whatever a user names settings by to a recipe."""

from __future__ import annotations

from os import PathLike, fspath

from ..policies import Interval
from ..predictors import Reuse
from ..recipe import Recipe
from ..targets.spec import Nothing
from .base import Config
from .presets import preset, presets
from .resolve import resolve

ENDING = ".json"
OFF = "off"  # every step computes, and nothing is kept


def settings_of(what: object, label: str = "config") -> tuple[Recipe, Config | None]:
    """Our recipe, and our copy of the config, for all that `enable` takes.

    Args:
        what: a Recipe, one of our configs or diffusers' own object, a preset's name, "off", or the path of a recipe
            file.
        label: what errors call it.
    Returns:
        The recipe, and the config where there was one.
    Raises:
        TypeError: `what` is something else; the message names `label`.
        ValueError: no preset has this name, or what is wrong with the file.
    """
    if isinstance(what, PathLike) or (isinstance(what, str) and what.endswith(ENDING)):
        path = fspath(what)
        if not isinstance(path, str) or not path.endswith(ENDING):
            raise ValueError(f"{label} is {path!r}, must be a recipe file that ends in {ENDING}")
        return Recipe.load(path), None
    if what == OFF and isinstance(what, str):
        return Recipe.of(Recipe(Interval(1), Reuse(), Nothing()).rules, OFF), None
    if isinstance(what, str):
        if what not in presets():
            raise ValueError(
                f"{label} is {what!r}, must be the name of a preset ({', '.join(presets())}), {OFF!r}, or the path "
                f"of a recipe file that ends in {ENDING}"
            )
        what = preset(what)
    return resolve(what, label)
