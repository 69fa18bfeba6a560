# SPDX-License-Identifier: Apache-2.0
"""A calibration out of what a calibrating run has measured."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .. import sync
from ..runtime.denoiser import Denoiser
from ..runtime.settings import Calibrated
from .calibration import Calibration
from .errors import CalibrationError
from .fields import MAX_GRAM
from .grams import Gram, Grams

# (model, context), the ratios of a run, and how many steps it had
Measured = tuple[tuple[str, str], list[Tensor], int]


def measured(calibrated: Calibrated, denoisers: Iterable[Denoiser]) -> Iterator[Measured]:
    """What calibrating runs have measured, those that are over and those that still go on."""
    for key, finished in calibrated.items():
        yield from ((key, ratios, count) for ratios, count in finished)
    for denoiser in denoisers:
        yield from denoiser.measured()


def collect(
    finished: Iterable[Measured],
    watched: Mapping[tuple[str, str], list[list[float]]] | None = None,
    contexts: Sequence[str] | None = None,
    steps: int | None = None,
    inputs: Mapping[tuple[str, str], list[tuple[float, float]]] | None = None,
    grams: Grams | None = None,
    guides: Mapping[str, Grams] | None = None,
    **names: Any,
) -> Calibration:
    """A calibration out of runs of `MagCacheConfig(calibrate=True)`.

    watched: first-block changes by (model, context). contexts: those to keep. steps: how many there must
    be, None for any. inputs: changes of the modulated input and of the output, by (model, context). grams: of
    the values of each run's steps, likewise. names: fields of `Calibration` that name the run.
    """
    runs: dict[tuple[str, str], list[list[float]]] = {}
    for key, found, count in finished:
        runs.setdefault(key, []).append(_per_step(sync.numbers(found), count))
    if not runs:
        raise CalibrationError(
            "calibration: nothing was measured; enable with MagCacheConfig(calibrate=True) and run "
            "the model, or use fastcache.calibrate(run, target), whose run must call the target"
        )
    several = len({model for model, _ in runs}) > 1

    def label(key: tuple[str, str]) -> str:
        return f"{key[0]}/{key[1]}" if several else key[1]

    ratios = {label(key): _mean(_whole(lists), label(key)) for key, lists in runs.items()}
    if contexts is not None:
        if missing := [name for name in contexts if name not in ratios]:
            raise CalibrationError(
                f"calibration: contexts holds {missing[0]!r}, but the run used {list(ratios)}"
            )
        ratios = {name: ratios[name] for name in contexts}
    length = max(map(len, ratios.values()))
    if steps is not None and length != steps:
        raise CalibrationError(
            f"calibration: num_inference_steps is {steps}, but the run made {length} model calls "
            "per context; count calls, not scheduler steps, or leave it out"
        )

    def of_all(found: Grams) -> dict[str, Any]:
        """The mean of each context's matrices."""
        means = {label(key): _mean_gram(runs) for key, runs in found.items()}
        return {name: rows for name, rows in means.items() if name in ratios and rows}

    changes = {label(key): rows for key, rows in (watched or {}).items() if label(key) in ratios}
    return Calibration(
        _mean(_whole(list(ratios.values())), "mag_ratios"),
        ratios,
        {name: tuple(map(tuple, rows)) for name, rows in changes.items()},
        {label(key): tuple(rows) for key, rows in (inputs or {}).items() if label(key) in ratios},
        of_all(grams or {}),
        {name: of_all(found) for name, found in (guides or {}).items()},
        steps=length,
        runs=max(map(len, runs.values())),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **names,
    )


def _mean_gram(grams: list[Gram]) -> tuple[tuple[float, ...], ...]:
    """The lower triangle, unitless, of the mean over runs; nothing of a run that is too long, or not finite."""
    found = np.array(_whole(grams), dtype=np.float64)
    sizes = np.einsum("rii->r", found) / found.shape[-1]
    if found.shape[-1] > MAX_GRAM or not np.isfinite(found).all() or not sizes.all():
        return ()
    mean = (found / sizes[:, None, None]).mean(0)
    return tuple(tuple(map(float, row[: i + 1])) for i, row in enumerate(mean))


def _per_step(ratios: Sequence[float], steps: int) -> list[float]:
    """One ratio per step: the mean over the parts of a stack whose lists have no common residual."""
    parts = max(len(ratios) // max(steps, 1), 1)
    return [sum(ratios[i : i + parts]) / parts for i in range(0, parts * steps, parts)]


def _whole(runs: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """The runs of full length: one that was cut short says nothing about the rest."""
    longest = max(map(len, runs))
    return [run for run in runs if len(run) == longest]


def _mean(runs: Sequence[Sequence[float]], name: str) -> tuple[float, ...]:
    means = tuple(sum(column) / len(runs) for column in zip(*runs, strict=True))
    for step, value in enumerate(means):
        if not math.isfinite(value) or value <= 0:
            raise CalibrationError(
                f"calibration: the ratio of step {step} in {name!r} is {value}; the model produced "
                "NaN or infinity, or its blocks add exactly nothing"
            )
    return means
