# SPDX-License-Identifier: Apache-2.0
"""The change of what the latents hold beside noise, decided before the forward begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import sync
from ...policies import Step
from ...storage.state import State
from .model_input import InputChange

TINY = 1e-16
TINIEST = 1e-6  # sigma lies so far from 0 and from 1


def signal_gain(size: int, sigma: float, power: float, device: torch.device) -> Tensor:
    """Wiener's gain of the frequencies of one axis, [size], with a mean of 1.

    Of a signal with the spectrum 1 / f^power in white noise, at x = (1 - sigma) signal + sigma noise.
    """
    frequency = torch.fft.fftfreq(size, device=device, dtype=torch.float32).abs()
    spectrum = 1.0 / (frequency.pow(power) + TINY)
    scale = 1.0 - sigma
    gain = scale * spectrum / (scale**2 * spectrum + sigma**2 + TINY)
    return gain / gain.mean()


def signal_part(x: Tensor, sigma: float, power: float) -> Tensor:
    """x [N, C, (T,) H, W] with the gain of its axes after the second; fp32 inside, the dtype of x."""
    axes = tuple(range(2, x.dim()))
    sigma = max(TINIEST, min(1.0 - TINIEST, sigma))
    spectrum = torch.fft.rfftn(x.float(), dim=axes)
    for axis in axes:
        gain = signal_gain(x.shape[axis], sigma, power, x.device)[: spectrum.shape[axis]]
        spectrum = spectrum * gain.reshape(-1, *[1] * (x.dim() - 1 - axis))
    return torch.fft.irfftn(spectrum, s=[x.shape[axis] for axis in axes], dim=axes).to(x.dtype)


class FilteredChange(InputChange):
    """The relative L1 change of each latent, filtered; their mean, or the largest where samples are apart."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.per_sample = True

    def latents(self, args: tuple, kwargs: dict) -> list[Tensor] | None:
        """Of a call, each [C, (T,) H, W]."""
        assert self.signal is not None
        if self.signal.latents is not None:
            given = self.signal.latents(self.model, args, kwargs)
            return None if not given else [value.detach() for value in given]
        value: Tensor = super().latents(args, kwargs)
        if value.dim() not in (4, 5):
            raise ValueError(
                f"when: {type(self.when).__name__} filters latents of [B, C, H, W] or [B, C, T, H, W], and the model "
                f"is called with {tuple(value.shape)}; give raw_vision_callback (of a policy: latents), which "
                "returns them"
            )
        return list(value.unbind())

    def of_call(self, step: Step, args: tuple, kwargs: dict) -> Tensor | None:
        found = self.latents(args, kwargs)
        self.sums = (len(found or ()) or 1, 2)
        if found is None or step.sigma is None or not 0 <= step.sigma <= 1:
            return None
        assert self.signal is not None
        power = self.signal.power
        if len({value.shape for value in found}) == 1:
            return signal_part(torch.stack(found), step.sigma, power)
        # of unlike shapes: each a row, with zeros at its end, of which no sum takes notice
        rows = [signal_part(value[None], step.sigma, power).flatten() for value in found]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def measure(self, state: State, y: Tensor, x: Tensor | None) -> Tensor | None:
        slots = self._slots(state)
        if slots.kept_reference and slots.reference.shape != y.shape:
            slots.kept_reference = False
        return super().measure(state, y, x)

    def missed(self, state: State) -> None:
        self._slots(state).kept_reference = False

    def read(self, measured: Tensor, group: Any) -> float:
        return sync.relative_change(measured, group, mean=not self.when.per_sample)
