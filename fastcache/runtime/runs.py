"""Requests whose runs begin and end."""

from __future__ import annotations

from typing import Any

ALL: Any = object()  # every request
