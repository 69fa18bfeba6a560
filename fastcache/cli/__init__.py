# SPDX-License-Identifier: Apache-2.0
"""The command line."""

from .command import main

__all__ = [
    "main",
]
