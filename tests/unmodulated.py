# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose first block's modulated input is not known."""

# Models of which nothing is known, and why: the row of none of them would be exact.
POSITIONS = "positions are added to the block's input inside the block"
SHARED = "shift and scale are made once for all blocks and handed on in pieces"
UNTIMED = "the first block's input holds the timestep already; nothing modulates it there"
OWN = "a modulation of its own form: per token, by index, or without a shift"
WITHOUT = {
    "BriaFibo2": OWN, "Cosmos": POSITIONS, "Cosmos3Omni": UNTIMED, "DreamLite2D": UNTIMED,
    "ErnieImage": SHARED, "Flux3": SHARED, "Ideogram4": OWN, "JoyImageEdit": OWN, "JoyImageEditPlus": OWN,
    "Kandinsky6": OWN, "Kandinsky6SR": OWN, "Krea2": OWN, "LTX2": OWN, "LongCatAudio": OWN, "MiniMaxH3": OWN,
    "MiniMaxMusic3": UNTIMED, "NucleusMoE": OWN, "OmniGen": UNTIMED, "PRX": OWN, "Prior": UNTIMED,
    "QwenImage21": SHARED, "RFD4Proteina": OWN, "SanaWM": OWN, "SanaWMRefiner": OWN, "StableAudio": UNTIMED,
    "StableAudio3": SHARED, "T5Film": OWN, "Transformer2D": UNTIMED, "TransformerTemporal": UNTIMED,
    "ZImage": OWN,
}  # fmt: skip
