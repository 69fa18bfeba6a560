# SPDX-License-Identifier: Apache-2.0
"""Pipelines as people run them: a run depends on nothing that came before it, and on nobody beside it.

Every output is held against that of the same run alone on a fresh cache, bit by bit.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

diffusers = pytest.importorskip("diffusers", minversion="0.36")

from tiny_pipelines import KINDS  # noqa: E402

import fastcache  # noqa: E402
from fastcache import Interval, Recipe, Taylor  # noqa: E402
from fastcache.models.pipeline import denoisers_of  # noqa: E402

STEPS, OTHER = 6, 5  # of a run, and of one with other settings
RECIPES: dict[str, Callable[[str], Any]] = {
    "Taylor": lambda kind: Recipe(Interval(3, warmup=1), Taylor(1)),
    "FirstBlock": lambda kind: fastcache.FirstBlockCacheConfig(THRESHOLDS.get(kind, 0.5)),
    "TaylorSeer": lambda kind: fastcache.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1
    ),
}
THRESHOLDS = {"Z-Image": 2.0}  # where .5 reuses nothing
# what says that it lies on a device, what the cache is attached to, and the recipe
CASES = (
    ("nothing", "pipeline", "Taylor"),
    ("nothing", "denoiser", "FirstBlock"),
    ("nothing", "pipeline", "TaylorSeer"),
    ("timesteps", "pipeline", "FirstBlock"),
    ("timesteps", "denoiser", "Taylor"),
    ("conditions", "denoiser", "TaylorSeer"),
    ("conditions", "pipeline", "Taylor"),
)
# steps of each context in a run, where it is not one loop of all steps
ONCE, TWICE = [*range(STEPS)], [*range(STEPS), *range(STEPS)]
HALVES = [*range(STEPS // 2), *range(STEPS // 2)]
COUNTED: dict[str, list[int]] = {
    "SD3, Heun": [0, *(s for s in range(1, STEPS) for _ in "ab")],
    "SkyReels": TWICE,
    "SkyReels, staggered": [*range(STEPS + 3 * 2), *range(STEPS + 1 * 2)],
    "Helios": TWICE,
    "Wan, two experts": HALVES,
    "Wan image, two experts": HALVES,
}
# those that other changes are about, with the reason
EXPECTED_LATER = {
    "SD3, first layer skipped": "a stack whose first block does not run is not known as such",
}


# --- tensors that say they lie on an accelerator --------------------------------------------------


class OnDevice(Tensor):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, OnDevice) else value


def move(model: nn.Module, everything: bool) -> None:
    """Have a model's timestep, or all but its latents, say so to what is above its own forward, not to that."""
    own = type(model).forward
    names = list(inspect.signature(own).parameters)[1:]
    latents = "hidden_states" if "hidden_states" in names else names[0]
    same = WeakIdKeyDictionary()  # what comes again is the same object again

    def claim(name: str, value: Any) -> Any:
        moves = (everything and name != latents) or name in ("timestep", "t")
        if not moves or not isinstance(value, Tensor):
            return value
        if value not in same:
            same[value] = value.as_subclass(OnDevice)
        return same[value]

    def moved(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = zip(names, args, strict=False)
        return tuple(claim(*v) for v in given), {k: claim(k, v) for k, v in kwargs.items()}

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(model, *map(plain, args), **{k: plain(v) for k, v in kwargs.items()})

    model.forward = forward
    model.register_forward_pre_hook(moved, with_kwargs=True)


# --- runs -----------------------------------------------------------------------------------------


class Pair:
    """Two pipelines of one kind that share their denoisers, and what runs of them alone give."""

    def __init__(self, kind: str, place: str) -> None:
        self.kind, self.place = kind, place
        (self.pipe, self.inputs), (self.twin, _) = KINDS[kind](), KINDS[kind]()
        self.meet: threading.Barrier | None = None  # where threads wait before every call
        self._alone: dict[Any, Tensor] = {}
        for name, model in denoisers_of(self.pipe):
            setattr(self.twin, name, model)
            if place != "nothing":
                move(model, everything=place == "conditions")
            model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        if self.meet is not None:
            self.meet.wait(30)

    def generate(
        self, seed: int = 0, steps: int = STEPS, twin: bool = False, **more: Any
    ) -> Tensor:
        pipe = self.twin if twin else self.pipe
        result = pipe(
            **{**self.inputs, "output_type": "latent"},
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            **more,
        )[0]
        return torch.as_tensor(result)

    @contextlib.contextmanager
    def cached(self, target: str, recipe: str) -> Iterator[list[fastcache.Cache]]:
        """Attached to one pipeline of the two, or to the denoisers of both."""
        models = [model for _, model in denoisers_of(self.pipe)]
        parts = [self.pipe] if target == "pipeline" else models
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore", UserWarning)
            make = RECIPES[recipe]
            yield [stack.enter_context(fastcache.enable(p, make(self.kind))) for p in parts]

    def alone(self, target: str, recipe: str, **run: Any) -> Tensor:
        key = (target, recipe, *run.items())
        if key not in self._alone:
            with self.cached(target, recipe):
                self._alone[key] = self.generate(**run)
        return self._alone[key]


@pytest.fixture(scope="module", params=KINDS)
def pairs(request):
    torch.set_num_threads(1)  # this fixture runs before the one that does it for a test
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {place: Pair(request.param, place) for place in {case[0] for case in CASES}}


class Interrupted(Exception):
    pass


def fails(pair: Pair) -> None:
    """An exception between two steps."""

    def stop(*given: Any) -> dict:
        if given[-3] == STEPS // 2 + 1:
            raise Interrupted
        return {}

    known = inspect.signature(type(pair.pipe).__call__).parameters
    name = "callback_on_step_end" if "callback_on_step_end" in known else "callback"
    with pytest.raises(Interrupted):
        pair.generate(**{name: stop})


def stops(pair: Pair) -> None:
    """The later steps are left out, as a button in a user interface asks for; where a pipeline can do that."""

    def ask(pipe: Any, step: int, *rest: Any) -> dict:
        pipe._interrupt = step >= STEPS // 2
        return {}

    if hasattr(type(pair.pipe), "interrupt"):
        pair.generate(callback_on_step_end=ask)


def differs(pair: Pair) -> None:
    """Another seed, and another number of steps."""
    pair.generate(seed=1, steps=OTHER)


def repeats(pair: Pair) -> None:
    pair.generate()


def counted(kind: str, target: str, context: str) -> list[int]:
    if kind == "Wan, two experts" and target == "denoiser":
        return ONCE  # its pipeline tells the step, and each cache has but one expert
    if "skipped" in kind and context != "default":
        return [*range(4)]  # the weaker model is asked in some of the steps
    return COUNTED.get(kind, ONCE)


@pytest.fixture
def expected(request, pairs):
    if reason := EXPECTED_LATER.get(next(iter(pairs.values())).kind):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_run_equals_the_run_alone_whatever_came_before(pairs, case):
    place, target, recipe = case
    pair = pairs[place]
    alone = pair.alone(target, recipe, seed=0)
    with pair.cached(target, recipe) as caches:
        for before in (repeats, fails, stops, differs):
            before(pair)
            seen = [len(cache.stats) for cache in caches]
            assert torch.equal(pair.generate(), alone), f"after a run that {before.__name__}"
            records = [r for c, n in zip(caches, seen, strict=True) for r in list(c.stats)[n:]]
            assert any("reuse" in r.actions for r in records)
            for context in {r.context for r in records}:
                steps = [r.step for r in records if r.context == context]
                assert steps == counted(pair.kind, target, context), context
        shorter = pair.generate(seed=1, steps=OTHER)
    assert torch.equal(shorter, pair.alone(target, recipe, seed=1, steps=OTHER))


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_runs_in_two_threads_that_take_turns_equal_the_runs_alone(pairs, case):
    """Where the cache is attached to one of the pipelines, nobody announces the other's runs."""
    place, target, recipe = case
    pair, found = pairs[place], {}
    runs = ({"seed": 0}, {"seed": 1, "twin": True})
    alone = [pair.alone(target, recipe, **run) for run in runs]

    def user(number: int) -> None:
        try:
            found[number] = pair.generate(**runs[number])
        except BaseException as error:
            found[number] = error
            pair.meet.abort()

    pair.meet = threading.Barrier(2)
    try:
        with pair.cached(target, recipe):
            threads = [threading.Thread(target=user, args=(i,)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
    finally:
        pair.meet = None
    errors = [v for v in found.values() if not isinstance(v, Tensor)]
    assert not errors
    assert all(torch.equal(found[i], alone[i]) for i in range(2))
