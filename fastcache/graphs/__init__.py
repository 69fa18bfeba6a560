"""Compiled, captured and exported steps."""
