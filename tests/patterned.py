# SPDX-License-Identifier: Apache-2.0
"""A model whose blocks have one of cache-dit's six forward patterns."""

from __future__ import annotations

import torch
from torch import nn


class PatternBlock(nn.Module):
    """A block of one of the six patterns."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern, self.mix = pattern, nn.Linear(8, 8)

    def forward(self, hidden_states, encoder_hidden_states=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        hidden = hidden_states + torch.tanh(self.mix(hidden_states + text.mean(1, keepdim=True)))
        text = text + 0.1 * hidden.mean(1, keepdim=True)
        if self.pattern.Return_H_Only:
            return hidden
        return (hidden, text) if self.pattern.Return_H_First else (text, hidden)


class PatternModel(nn.Module):
    def __init__(self, pattern, depth=5):
        super().__init__()
        torch.manual_seed(0)
        self.pattern = pattern
        self.parts = nn.ModuleList(PatternBlock(pattern) for _ in range(depth))

    def forward(self, hidden_states, encoder_hidden_states):
        given = () if self.pattern.Forward_H_only else (encoder_hidden_states,)
        for block in self.parts:
            found = block(hidden_states, *given)
            if self.pattern.Return_H_Only:
                hidden_states = found
                continue
            hidden_states, text = found if self.pattern.Return_H_First else found[::-1]
            given = given and (text,)
        # text that blocks return and do not take is that of the last computed step with us
        if self.pattern.Return_H_Only or not given:
            return hidden_states
        return hidden_states + text.mean()


def pattern_calls(steps=8):
    g = torch.Generator().manual_seed(1)
    hidden, text = torch.randn(1, 6, 8, generator=g), torch.randn(1, 6, 8, generator=g)
    return [(hidden * (1 + 0.02 * i), text) for i in range(steps)]
