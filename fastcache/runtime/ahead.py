"""Steps that are decided before their call, which may run inside a graph."""

from __future__ import annotations

from typing import NamedTuple

from ..policies import Run, Step
from ..storage.state import State
from .context import Context


class Prepared(NamedTuple):
    """A step decided before its call, which may run inside a graph."""

    state: State
    step: Step
    runs: list[Run]  # what the policies remembered before
    frame: Context
