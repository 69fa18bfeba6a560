# SPDX-License-Identifier: Apache-2.0
"""Docstrings on their way to the site, whose parser wants blank lines between sections."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"\n+(?=(?:Args|Returns|Raises):\n)")
SOURCE = re.compile(r"\n+Source:\s*")


def spaced(text: str) -> str:
    """The same with a blank line before each section, and the source as a paragraph."""
    return SOURCE.sub("\n\n**Source:** ", SECTION.sub("\n\n", text))


class Spaced(griffe.Extension):
    """Takes every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = spaced(obj.docstring.value)
