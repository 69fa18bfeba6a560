# SPDX-License-Identifier: Apache-2.0
"""Pictures from words: the third kind of trained model of the benchmarks, in four sizes.

Images are [B, 3, 32, 32] in [-1, 1], packed 4x4 into 64 tokens of 48 channels. A prompt is at most
six words; the empty one is the null prompt of classifier-free guidance.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """What `bench pictures` does: one picture of all costs."""
    from .picture import main as draw

    return draw(argv)
