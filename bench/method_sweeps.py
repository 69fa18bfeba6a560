# SPDX-License-Identifier: Apache-2.0
"""Settings of the methods that people know by name, each with what it predicts with elsewhere and with ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import fastcache
from fastcache import (
    DMD,
    Chebyshev,
    DBCacheConfig,
    FirstBlock,
    Hermite,
    InputChange,
    Interval,
    Mask,
    Output,
    OutputSlope,
    Predictor,
    Recipe,
    Reuse,
    Sensitivity,
    Taylor,
    Widening,
    steps_mask,
)
from fastcache.policies.coefficients import PUBLISHED

from . import systems
from .points import Point
from .subjects import Cell, Subject
from .sweeps import fewer

PREDICTORS: dict[str, Predictor] = {"reuse": Reuse(), "order 1": Taylor(1)}

# sums up to which steps are skipped
INPUT = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
PUBLISHED_INPUT = (0.15, 0.25, 0.4, 0.6)
SLOPE = (0.02, 0.05, 0.1, 0.2, 0.3)
FILTERED = (0.1, 0.15, 0.25, 0.4, 0.6)
DISTANCE = (0.3, 0.5, 0.7, 1.0, 1.5)
DUAL = (0.08, 0.15, 0.2, 0.3)

ENDS = ((1, 0), (2, 0), (1, 1), (4, 0))
INTERVALS = (2, 3, 4, 6)
FORECASTS: dict[str, Predictor] = {
    "order 1": Taylor(1),
    "order 2": Taylor(2, skip_first=True),
    "Hermite 1": Hermite(1),
    "Hermite 2": Hermite(2),
    "Chebyshev": Chebyshev(),
    "Chebyshev, ridge .001": Chebyshev(ridge=0.001),
    "DMD": DMD(),
}
FLEX = (0.25, 0.75, 3.0)
PLANNED = (0.3, 0.4, 0.55)  # shares of computed steps
MASKS = ("slow", "medium", "fast", "ultra")
CALIBRATED = 1234  # the seed of a calibration, which no measured sample has


class Learnt:
    """What is measured on a model before its methods are: once, and when it is first asked for."""

    def __init__(self, subject: Subject, steps: int) -> None:
        self.subject, self.steps = subject, steps
        self.calibration = cache(self._calibration)
        self.alphas = cache(self._alphas)

    def _run(self, model: nn.Module, **options: Any) -> None:
        labels = torch.arange(10) % self.subject.labels
        self.subject.generate(model, labels, steps=self.steps, seed=CALIBRATED, **options)

    def _calibration(self) -> Any:
        model = self.subject.load()
        run = partial(self._run, model)
        with systems.quietly():
            return fastcache.calibrate(
                lambda cache: run(cache=cache), model, num_inference_steps=self.steps
            )

    def _alphas(self) -> tuple[float, float]:
        """The relative change of the output per unit of the latents' norm, and per unit of the step's time, 0 to 1000:
        finite differences between neighbouring steps, the mean over a run."""
        model, calls = self.subject.load(), []
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
        self._run(model)
        hook.remove()
        found = []
        for before, after in itertools.pairwise(calls):
            value = _output(model, after)
            by_x = _output(model, {**after, "hidden_states": before["hidden_states"]})
            by_t = _output(model, {**after, "timestep": before["timestep"]})
            moved = float((after["hidden_states"] - before["hidden_states"]).norm())
            found.append([float((v - value).norm() / value.norm()) for v in (by_x, by_t)])
            found[-1][0] /= moved
            found[-1][1] /= 1000 / self.steps
        x, t = torch.tensor(found).mean(0).tolist()
        return x, t


@torch.no_grad()
def _output(model: nn.Module, call: dict[str, Any]) -> Tensor:
    found = model(**call)
    return found[0] if isinstance(found, tuple) else found.sample


def pictures_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents of a call as [C, T, H, W]: tokens of a square, an image, or as they are."""
    latents = kwargs["hidden_states"]
    if latents.dim() >= 4:
        return list(latents if latents.dim() == 5 else latents.unsqueeze(2))
    side = round(latents.shape[1] ** 0.5)
    return [x.T.reshape(-1, 1, side, side) for x in latents]


def named_points(cell: Cell, subject: Subject) -> Iterator[Point]:
    """Every method that people know by name, at these settings, and what they are held against."""
    yield from fewer(cell.steps)
    learnt = Learnt(subject, cell.steps)
    yield from signal_points(cell, learnt)
    yield from dual_points(cell.steps)
    yield from forecast_points(learnt)
    yield from scheduled_points(cell.steps, learnt)


def made(method: str, predictor: str, setting: str, make: Callable[[], Any]) -> Point:
    """A point whose config is made when it is measured."""
    attach = lambda model: systems.attach_fastcache(model, make())  # noqa: E731
    return Point("fastcache", method, predictor, setting, attach)


def signal_points(cell: Cell, learnt: Learnt) -> Iterator[Point]:
    """What decides before any block has run. Guards are those that a recipe has by default."""
    power = 3.0 if cell.model == "video" else 2.0
    flux = PUBLISHED["flux"].coefficients
    for label, what in PREDICTORS.items():

        def on(
            method: str,
            setting: str,
            when: Callable[[], Any],
            *where: Any,
            label: str = label,
            what: Predictor = what,
        ) -> Point:
            return made(method, label, setting, lambda: Recipe(when(), what, *where))

        for t in INPUT:
            yield on("TeaCache", f"{t:g}, plain", partial(InputChange, t))
            yield on(
                "TeaCache",
                f"{t:g}, fitted",
                lambda t=t: InputChange(t, learnt.calibration().input_fit().coefficients),
            )
        for t in PUBLISHED_INPUT if cell.model != "video" else ():
            yield on("TeaCache", f"{t:g}, published", partial(InputChange, t, flux))
        for t in SLOPE:
            yield on("EasyCache", f"{t:g}", partial(OutputSlope, t, 1), Output())
        filtered = partial(InputChange, at="model_input", power=power, latents=pictures_of)
        for t in FILTERED:
            yield on("SeaCache", f"{t:g}", partial(filtered, t))
        for t in DISTANCE:
            yield on("SenCache", f"{t:g}", lambda t=t: Sensitivity(t, *learnt.alphas()))


def dual_points(steps: int) -> Iterator[Point]:
    """cache-dit's rule, with blocks at either end that always run."""
    for t, (label, what) in itertools.product(DUAL, PREDICTORS.items()):
        yield made("FirstBlock", label, f"{t:g}", partial(Recipe, FirstBlock(t), what))
    for (first, last), (label, what) in itertools.product(ENDS, PREDICTORS.items()):
        for t in DUAL:
            config = DBCacheConfig(first, last, t, max_warmup_steps=4, num_inference_steps=steps)
            yield made("DBCache", label, f"{t:g}, F{first}B{last}", partial(config.recipe, what))
    for name, (label, what) in itertools.product(MASKS, PREDICTORS.items()):
        marks = steps_mask(name, steps)
        yield made("mask", label, name, partial(Recipe, Mask(marks, max_skips=0), what))


def forecast_points(learnt: Learnt) -> Iterator[Point]:
    """Predictors on the schedules that Taylor's orders are swept on."""
    for n in INTERVALS:
        when = Interval(n, warmup=4, last=True)
        for label, what in FORECASTS.items():
            yield made("Interval", label, f"every {n}", partial(Recipe, when, what))
        yield made(
            "Interval",
            "fitted, 3 kept",
            f"every {n}",
            lambda when=when: Recipe(when, learnt.calibration().fit(when, keep=3)),
        )


def scheduled_points(steps: int, learnt: Learnt) -> Iterator[Point]:
    """Spectrum's window, and plans for a number of computed steps."""
    spectrum = {"order 1": Taylor(1)} | {k: v for k, v in FORECASTS.items() if "Cheb" in k}
    for flex, (label, what) in itertools.product(FLEX, spectrum.items()):
        yield made("Spectrum", label, f"flex {flex:g}", partial(Recipe, Widening(2.0, flex), what))
    for share, (label, what) in itertools.product(PLANNED, PREDICTORS.items()):
        n = round(share * steps)
        for cost in ("steps", "final"):
            yield made(
                "plan",
                label,
                f"{n} computed, {cost}",
                lambda n=n, what=what, cost=cost: learnt.calibration().plan(n, what, cost=cost),
            )
