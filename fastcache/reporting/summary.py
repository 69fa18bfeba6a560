"""A cache in words."""

from __future__ import annotations

from ..recipe import Rule


def describe(rule: Rule) -> str:
    """A rule in three words."""
    return " × ".join(type(part).__name__ for part in (rule.when, rule.what, rule.where))
