# SPDX-License-Identifier: Apache-2.0
"""Whoever calls, and however: runs, branches, ages and records of callers that announce little or nothing.

Every situation is held against the same calls uncached, or against the same run alone.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache import Interval, Mask, Recipe, Reuse, Taylor

HALF = Recipe(Interval(2), Reuse())  # every second step is a copy


class OnDevice(Tensor):
    """A timestep that says that it lies on an accelerator."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


class Far(toys.Model):
    """A model that is given such timesteps, and sees them as they are."""

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):  # type: ignore[override]
        if isinstance(timestep, OnDevice):
            timestep = timestep.as_subclass(Tensor)
        return super().forward(hidden_states, timestep, encoder_hidden_states)


def far(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "timestep": Tensor._make_subclass(OnDevice, call["timestep"])}


PLACES: dict[str, Callable[[dict], dict]] = {"host": lambda call: call, "device": far}


def called(target: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return target(**call)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def runs_of(calls: list[dict], recipe: Any = HALF, **model: Any) -> list[Tensor]:
    """The outputs of a run alone, under a name of its own."""
    target = Far(**model)
    with fastcache.enable(target, recipe) as cache, cache.run(num_inference_steps=len(calls)):
        return [called(target, call) for call in calls]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastcache.FastcacheWarning)
        yield


def acts(cache: fastcache.Cache) -> str:
    return "".join("C" if r.action == "compute" else "." for r in cache.stats)


# --- where runs begin -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stopped", [1, 2, 5])
def test_a_run_after_a_cancelled_one_equals_the_run_alone(place, stopped):
    """Nothing announces a cancelled run; a timestep on a device is looked at before anything is reused."""
    first, then = (list(map(PLACES[place], toys.inputs(6, seed=s))) for s in (0, 1))
    target = Far()
    with quiet(), fastcache.enable(target, HALF) as cache:
        for call in first[:stopped]:
            called(target, call)
        outputs = [called(target, call) for call in then]
        steps = [r.step for r in cache.stats][stopped:]
    if stopped == 1:  # the second run's first step comes at the very same timestep: nobody can tell
        plain = toys.plain(toys.model(), toys.inputs(6, seed=1))
        assert equal(outputs[:2], plain[:2])
    else:
        assert equal(outputs, runs_of(then)) and steps == list(range(6))


@pytest.mark.parametrize("place", PLACES)
def test_runs_that_are_announced_are_never_looked_for(place, monkeypatch):
    calls = list(map(PLACES[place], toys.inputs(6)))
    target, alone = Far(), runs_of(calls)
    with fastcache.enable(target, HALF) as cache:
        if place == "device":
            monkeypatch.setattr(
                "fastcache.sync.extreme", lambda *_: pytest.fail("a look at a device")
            )
        for stopped in (1, 6, 3, 6):
            outputs = []
            with cache.run(num_inference_steps=6):
                for i, call in enumerate(calls[:stopped]):
                    with cache.context(step_index=i):
                        outputs.append(called(target, call))
        assert not cache.denoisers[0].pool.states  # a run is forgotten at its end
    assert equal(outputs, alone)


def test_a_run_is_forgotten_also_when_it_fails():
    target = toys.Model()
    with fastcache.enable(target, HALF) as cache:
        with pytest.raises(KeyboardInterrupt), cache.run("mine"):
            called(target, toys.inputs()[0])
            raise KeyboardInterrupt
        assert not cache.denoisers[0].pool.states


def test_runs_have_requests_of_their_own_and_nest():
    target, calls = toys.Model(), toys.inputs(4)
    with fastcache.enable(target, HALF) as cache:
        with cache.run("outer", num_inference_steps=4):
            called(target, calls[0])
            with cache.run():
                called(target, calls[0])
            with cache.context("cond"):
                called(target, calls[1])
            called(target, calls[1])
        seen = [(r.request, r.context, r.step) for r in cache.stats]
    inner = seen[1][0]
    assert seen == [
        ("outer", "default", 0), (inner, "default", 0), ("outer", "cond", 0), ("outer", "default", 1)
    ]  # fmt: skip
    assert inner not in ("outer", 0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"request": []}, "request"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1.5}, "num_inference_steps"),
    ],
)
def test_a_run_refuses_by_name(arguments, named):
    with fastcache.enable(toys.Model(), HALF) as cache:
        with pytest.raises((TypeError, ValueError), match=named):
            cache.run(**arguments)


@pytest.mark.parametrize(
    "recipe", [HALF, Recipe(Interval(3), Taylor(1)), fastcache.FirstBlockCacheConfig(0.3)]
)
def test_time_that_rises_gives_the_same_picture_from_the_first_run_on(recipe):
    calls, target = toys.inputs(8, speed=0.02)[::-1], toys.Model()
    with quiet(), fastcache.enable(target, recipe) as cache:
        for run in range(3):
            with cache.run():
                outputs = [called(target, call) for call in calls]
            if run == 0:
                first = outputs
            assert equal(outputs, first)
        assert [r.step for r in cache.stats] == 3 * list(range(8))


def test_time_that_rises_is_learnt_without_reusing_anything():
    calls, target = toys.inputs(8)[::-1], toys.Model()
    with fastcache.enable(target, Recipe(Interval(3), Taylor(1))) as cache:
        first, again = ([called(target, c) for c in calls] for _ in range(2))
        assert equal(list(first), list(again))
        assert [r.step for r in cache.stats] == 2 * list(range(8))


class Lumina2Transformer2DModel(Far):
    """By its name, a model whose time is known to rise."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_time_that_is_known_to_rise_need_not_be_learnt(place, wrapped):
    calls = list(map(PLACES[place], toys.inputs(8)[::-1]))
    target = Lumina2Transformer2DModel()
    target = Wrapper(target) if wrapped else target
    with fastcache.enable(target, HALF) as cache:
        first, again = ([called(target, c) for c in calls] for _ in range(2))
        first = list(first)
        assert equal(first, list(again)) and acts(cache) == 2 * "C.C.C.C."
        cache.reset()  # and another direction is learnt
        backwards = [[called(target, c) for c in calls[::-1]] for _ in range(3)]
        assert equal(*backwards[1:]) and [r.step for r in cache.stats] == 5 * list(range(8))


def test_a_pinned_first_frame_does_not_stop_the_clock():
    target, runs = toys.Model(), []
    calls = toys.inputs(6, batch=1)

    def pinned(call: dict[str, Any]) -> dict[str, Any]:
        t = float(call["timestep"][0])
        return {**call, "timestep": torch.tensor([[0.0, t, t]])}

    class Frames(toys.Model):
        def forward(self, hidden_states, timestep=None):  # type: ignore[override]
            return super().forward(hidden_states, timestep[:, -1])

    target = Frames()
    with fastcache.enable(target, HALF) as cache:
        for _ in range(2):
            runs.append([called(target, pinned(call)) for call in calls])
        assert [r.step for r in cache.stats] == 2 * list(range(6))
        assert acts(cache) == 2 * "C.C.C."
    assert equal(*runs)


class Frames(Far):
    """A model with a timestep per frame."""

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):  # type: ignore[override]
        if isinstance(timestep, OnDevice):
            timestep = timestep.as_subclass(Tensor)
        return super().forward(hidden_states, timestep.mean(-1), encoder_hidden_states)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stopped", [2, 3, 5])
def test_frames_that_wait_for_others_do_not_stop_the_clock(place, stopped):
    """Diffusion forcing: the last frame begins late, so the noisiest timestep is the same for many steps."""

    def run(seed: int) -> list[dict]:
        calls = toys.inputs(6, batch=1, seed=seed)
        frames = [[900.0 - 100 * max(i - lag, 0) for lag in (0, 3, 6)] for i in range(6)]
        given = [{**c, "timestep": torch.tensor([f])} for c, f in zip(calls, frames, strict=True)]
        return list(map(PLACES[place], given))

    target, alone = Frames(), Frames()
    with quiet(), fastcache.enable(alone, HALF):
        expected = [called(alone, call) for call in run(1)]
    with quiet(), fastcache.enable(target, HALF) as cache:
        for call in run(0)[:stopped]:
            called(target, call)
        assert equal([called(target, call) for call in run(1)], expected)
        assert [r.step for r in cache.stats] == [*range(stopped), *range(6)]


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("positional", [False, True])
def test_wrappers_are_looked_through(positional):
    target = Wrapper(toys.Model())
    with fastcache.enable(target, fastcache.FirstBlockCacheConfig(0.3)) as cache:
        for _ in range(2):
            for call in toys.inputs(5, speed=0.02):
                with torch.no_grad():
                    target(*call.values()) if positional else target(**call)
        assert acts(cache) == "C....C...."


class Experts:
    """Two denoisers that share a run between them."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = toys.Model(), toys.Model()


def test_each_branch_of_a_second_expert_counts_its_own_stretch():
    pipe, calls = Experts(), toys.inputs(8)
    with quiet(), fastcache.enable(pipe, Recipe(Interval(4), Taylor(1))) as cache:
        for _ in range(2):
            for i, call in enumerate(calls):
                for name in ("cond", "uncond"):
                    with cache.context(name, step_index=i, num_inference_steps=8):
                        called(pipe.transformer if i < 3 else pipe.transformer_2, call)
        for name in ("cond", "uncond"):
            steps = [r.step for r in cache.stats if r.context == name]
            assert steps == 2 * [*range(3), *range(5)], name


@pytest.mark.parametrize("first", [0, 3])
def test_the_first_step_of_a_run_that_was_cancelled_after_it_may_come_again(first):
    """An expert, or image-to-image, begins in the middle of the scale."""
    target, calls = toys.Model(), toys.inputs(8)
    with quiet(), fastcache.enable(target, HALF) as cache:
        runs = []
        for steps in (1, 3, 3):
            runs.append([])
            for i in range(first, first + steps):
                with cache.context("cond", step_index=i):
                    runs[-1].append(called(target, calls[i]))
        assert [r.step - first for r in cache.stats] == [0, 0, 1, 2, 0, 1, 2]
        assert equal(runs[1], runs[2])
        again = cache.context("cond", step_index=first + 2)
        with pytest.raises(ValueError, match="came twice"), again:
            called(target, calls[first + 2])


# --- solvers of second order ----------------------------------------------------------------------


def test_two_calls_per_timestep_count_steps_and_reuse_nothing_unclear():
    target, x = toys.model(), torch.randn(1, 6, 4)
    times = [float(t) for t in (1000, 900, 800, 700, 600, 500) for _ in "ab"][1:]
    config = fastcache.MagCacheConfig(num_inference_steps=6, mag_ratios=[1.0] * 6)
    plain = [
        called(toys.model(), {"hidden_states": x + 0.01 * i, "timestep": torch.tensor([t])})
        for i, t in enumerate(times)
    ]
    with fastcache.enable(target, config) as cache:
        with pytest.warns(fastcache.FastcacheWarning, match=r"cache\.context\('cond'\)"):
            out = [
                called(target, {"hidden_states": x + 0.01 * i, "timestep": torch.tensor([t])})
                for i, t in enumerate(times)
            ]
        assert [r.step for r in cache.stats] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all(
        torch.equal(a, b)
        for a, b, r in zip(out, plain, cache.stats, strict=True)
        if r.action == "compute"
    )


class Heun:
    """A scheduler as diffusers has them, and the loop of a pipeline around it."""

    order = 2

    def __init__(self) -> None:
        self.config, self._step_index = None, None
        self.timesteps = torch.tensor(
            [1000.0, *(t for t in (800.0, 600.0, 400.0, 200.0) for _ in "ab")]
        )


class Pipe:
    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer, self.scheduler = transformer, scheduler

    def __call__(self, x: Tensor, move: Callable[[dict], dict]) -> list[Tensor]:
        self.scheduler._step_index, found = None, []
        self._num_timesteps = len(self.scheduler.timesteps)
        for i, t in enumerate(self.scheduler.timesteps):
            call = move({"hidden_states": x + 0.01 * i, "timestep": t.expand(2).clone()})
            found.append(called(self.transformer, call))
            self.scheduler._step_index = i + 1
        return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "recipe",
    [
        HALF,
        Recipe(Interval(3, warmup=0, last=False), Taylor(1)),
        fastcache.FirstBlockCacheConfig(0.5),
        Recipe(fastcache.FirstBlock(0.05, warmup=0, last=False), Taylor(2)),
        fastcache.MagCacheConfig(num_inference_steps=5, mag_ratios=[1.0] * 5),
        toys.config("taylor_seer", disable_cache_before_step=1),
    ],
    ids=["Interval", "Taylor", "FirstBlock", "FirstBlock, Taylor", "MagCache", "TaylorSeer"],
)
def test_a_pipeline_with_a_solver_of_second_order_counts_its_steps(recipe, place):
    x = torch.randn(2, 6, 4)
    pipe = Pipe(Far(), Heun())
    plain = pipe(x, PLACES[place])
    with quiet(), fastcache.enable(pipe, recipe) as cache:
        outputs = pipe(x, PLACES[place])
        records = list(cache.stats)
        assert equal(pipe(x, PLACES[place]), outputs)
    assert [r.step for r in records] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert any(r.action == "reuse" for r in records)
    for record, out, exact in zip(records, outputs, plain, strict=True):
        assert record.action == "reuse" or torch.equal(out, exact)
    if isinstance(recipe, fastcache.MagCacheConfig):  # a step is decided once
        assert all(len({r.action for r in records if r.step == s}) == 1 for s in range(5))


# --- branches -------------------------------------------------------------------------------------


@contextlib.contextmanager
def weaker(model: nn.Module) -> Iterator[None]:
    """The same model with a layer perturbed, as in skip-layer guidance or with an adapter switched off."""
    weight = model.blocks[1].attn.to_out.weight
    weight.neg_()
    yield
    weight.neg_()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize(
    "config", [fastcache.FirstBlockCacheConfig(0.0), HALF], ids=["FirstBlock", "Interval"]
)
def test_guidance_by_a_weaker_model_does_not_vanish(config, announced, place):
    """The same inputs twice in a step: the second call is no copy of the first."""
    calls = list(map(PLACES[place], toys.inputs(6)))
    model = Far()

    def both() -> list[Tensor]:
        found = []
        for call in calls:
            strong = called(model, call)
            with weaker(model):
                found.append(strong - called(model, call))
        return found

    plain = both()
    with quiet(), fastcache.enable(model, config) as cache:
        with cache.run() if announced else contextlib.nullcontext():
            assert equal(both(), plain)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("announced", [False, True])
def test_windows_over_one_latent_are_never_mixed(announced, place):
    model, long = Far(), torch.randn(1, 18, 4)

    def windows() -> list[Tensor]:
        found = []
        for t in (1000.0, 800.0, 600.0, 400.0):
            time = PLACES[place]({"timestep": torch.tensor([t])})
            for w in range(3):
                found.append(called(model, {"hidden_states": long[:, 6 * w : 6 * w + 6], **time}))
        return found

    plain = windows()
    with quiet(), fastcache.enable(model, Recipe(Interval(3), Reuse())) as cache:
        with cache.run() if announced else contextlib.nullcontext():
            assert equal(windows(), plain)


def test_windows_that_are_named_are_cached():
    model, long = toys.Model(), torch.randn(1, 18, 4)
    with fastcache.enable(model, HALF) as cache, cache.run(num_inference_steps=4):
        for t in (1000.0, 800.0, 600.0, 400.0):
            for w in range(3):
                with cache.context(f"window {w}"):
                    called(
                        model,
                        {
                            "hidden_states": long[:, 6 * w : 6 * w + 6],
                            "timestep": torch.tensor([t]),
                        },
                    )
        assert acts(cache) == 2 * "CCC..."


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("around", ["nothing", "a context", "a run"])
def test_sequential_guidance_without_contexts_of_its_own(place, around):
    """Also inside of a context or a run that is open around the whole of it."""
    runs = {n: toys.inputs(6, seed=1, text=True) for n in "cu"}
    words = {
        n: torch.randn(2, toys.TEXT, toys.DIM, generator=torch.Generator().manual_seed(ord(n)))
        for n in runs
    }
    for name, calls in runs.items():
        for call in calls:
            call["encoder_hidden_states"] = words[name]  # the same object in every step
    make = lambda: Far(block=toys.Optional)  # noqa: E731
    alone = {}
    for name, calls in runs.items():
        target = make()
        with fastcache.enable(target, HALF) as cache, cache.run():
            alone[name] = [called(target, PLACES[place](call)) for call in calls]
    target, found = make(), {n: [] for n in runs}
    with fastcache.enable(target, HALF) as cache:
        frame = {
            "nothing": contextlib.nullcontext(),
            "a context": cache.context("mine", request="alice"),
            "a run": cache.run("alice"),
        }[around]
        with frame:
            for i in range(6):
                for name in runs:
                    call = PLACES[place](runs[name][i])
                    found[name].append(called(target, call))
        requests = {r.request for r in cache.stats}
        names = {r.context for r in cache.stats}
    name = "mine" if around == "a context" else "default"
    assert names == {name, f"{name}#2"} and requests == ({0} if around == "nothing" else {"alice"})
    for branch in runs:
        assert equal(found[branch], alone[branch]), branch


class Away(Far):
    """A model whose text lies on a device, too, where only the identity of a tensor can be known."""

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):  # type: ignore[override]
        return super().forward(hidden_states, timestep, encoder_hidden_states.as_subclass(Tensor))


def test_branches_of_a_next_run_with_new_text_on_a_device_are_cached_from_its_first_step_on():
    calls, target = toys.inputs(6, text=True), Away(block=toys.Optional)
    with fastcache.enable(target, HALF) as cache:
        runs = []
        for _ in range(3):
            made = [calls[0]["encoder_hidden_states"] * sign for sign in (1, -1)]
            words = [w.as_subclass(OnDevice) for w in made]  # pipelines encode it anew in every run
            given = [far({**c, "encoder_hidden_states": w}) for c in calls for w in words]
            runs.append([called(target, call) for call in given])
        assert equal(*runs[:2]) and equal(*runs[1:]) and acts(cache) == 9 * "CC.."
        assert [r.step for r in cache.stats] == 3 * [s for s in range(6) for _ in "cu"]


def test_a_request_that_comes_back_does_not_take_what_another_has_left():
    """Two generations of one loop, one step of each at a time, and nobody names them."""
    make = lambda: toys.Model(block=toys.Optional)  # noqa: E731
    a, b = (toys.inputs(8, seed=s, text=True, speed=0.3) for s in (0, 1))
    target = make()
    with quiet(), fastcache.enable(target, HALF):
        for call in a[:4]:
            called(target, call)
        for i in range(4):
            assert torch.equal(called(target, b[i]), called(make(), b[i]))
            assert torch.equal(called(target, a[4 + i]), called(make(), a[4 + i]))


def test_threads_are_different_requests():
    target, meet = toys.Model(), threading.Barrier(2)
    calls = {s: toys.inputs(8, seed=s) for s in range(2)}
    found: dict[int, list[Tensor]] = {s: [] for s in calls}

    def user(seed: int) -> None:
        for call in calls[seed]:
            meet.wait(20)
            found[seed].append(called(target, call))

    with fastcache.enable(target, HALF) as cache:
        threads = [threading.Thread(target=user, args=(s,)) for s in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len({r.request for r in cache.stats}) == 2
        for seed, calls_of in calls.items():
            assert equal(found[seed], runs_of(calls_of)), seed


def test_requests_of_threads_that_are_gone_leave_nothing():
    target, calls = toys.Model(), toys.inputs(3)
    with fastcache.enable(target, HALF) as cache:
        for _ in range(20):
            thread = threading.Thread(target=lambda: [called(target, call) for call in calls])
            thread.start()
            thread.join(60)
        gc.collect()
        called(target, calls[0])
        assert len(cache.denoisers[0].pool.states) <= 2


def test_a_context_around_calls_at_one_step_index_refuses_the_second():
    target, calls = toys.Model(), toys.inputs(3)
    with fastcache.enable(target, HALF) as cache:
        for index in (0, 2):
            with (
                pytest.raises(ValueError, match="step_index"),
                cache.context("cond", step_index=index),
            ):
                called(target, calls[0])
                called(target, calls[0])


def test_batches_that_alternate_get_states_of_their_own():
    target, runs = toys.Model(), {b: toys.inputs(6, batch=b) for b in (1, 2)}
    with fastcache.enable(target, HALF) as cache:
        found = {b: [] for b in runs}
        for i in range(6):
            for batch, calls in runs.items():
                found[batch].append(called(target, calls[i]))
        assert cache.stats.reused == 6
    for batch, calls in runs.items():
        assert equal(found[batch], runs_of(calls))


# --- age ------------------------------------------------------------------------------------------

RECIPES = {
    "Interval": Recipe(Interval(4), Reuse()),
    "Taylor": Recipe(Interval(4, warmup=0, last=False), Taylor(1)),
    "Mask": Recipe(Mask([1, 0, 0, 1, 1] + 15 * [0]), Reuse()),
    "Magnitude": fastcache.MagCacheConfig(
        num_inference_steps=20, mag_ratios=[1.0] * 20, retention_ratio=0.0
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_branch_that_pauses_reuses_nothing_that_is_older_than_allowed(name):
    limit = {"Interval": 3, "Taylor": 3, "Mask": 15, "Magnitude": 3}[name]
    target, calls = toys.Model(), toys.inputs(20)
    with quiet(), fastcache.enable(target, RECIPES[name]) as cache:
        for i in (0, 1, 2, 3, 4, 14, 15, 16, 17):
            with cache.context("uncond", step_index=i, num_inference_steps=20):
                called(target, calls[i])
        at = None
        for record in cache.stats:
            if record.action == "compute":
                at = record.step
            assert record.step - at <= limit, record
        (back,) = [r for r in cache.stats if r.step == 14]
        assert back.action == ("reuse" if name == "Mask" else "compute")


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
@pytest.mark.parametrize("announced", [False, True])
def test_a_pause_is_seen_by_what_the_other_branch_did(announced, order):
    """Nobody gives a step index: guidance is off for a while."""
    target, calls = toys.Model(), toys.inputs(20)
    with fastcache.enable(target, RECIPES["Interval"]) as cache:
        with cache.run() if announced else contextlib.nullcontext():
            for i, call in enumerate(calls):
                for name in order:
                    if name == "cond" or not 5 <= i < 14:
                        with cache.context(name):
                            called(target, call)
        steps = [(r.step, r.action) for r in cache.stats if r.context == "uncond"]
    assert [s for s, _ in steps] == [*range(5), *range(14, 20)]
    assert dict(steps)[14] == "compute"


@pytest.mark.parametrize("place", PLACES)
def test_a_branch_that_comes_late_takes_nothing_from_the_run_before(place):
    """Guidance that begins later, at a timestep that the branch has not reached in the run before."""
    calls = toys.inputs(12, text=True)
    runs = {n: [dict(call) for call in calls] for n in "cu"}
    for call in runs["u"]:
        call["encoder_hidden_states"] = -calls[0]["encoder_hidden_states"]
    for call in runs["c"]:
        call["encoder_hidden_states"] = calls[0]["encoder_hidden_states"]

    def run(target: nn.Module, guided: range) -> list[Tensor]:
        found = []
        for i in range(12):
            for name in "cu" if i in guided else "c":
                found.append(called(target, PLACES[place](runs[name][i])))
        return found

    make = lambda: Far(block=toys.Optional)  # noqa: E731
    config = fastcache.FirstBlockCacheConfig(5.0)  # whatever there is would be reused
    target, alone = make(), make()
    with quiet(), fastcache.enable(target, config):
        run(target, range(1, 4))
        outputs = run(target, range(6, 10))
    with quiet(), fastcache.enable(alone, config):
        assert equal(outputs, run(alone, range(6, 10)))


def test_branches_at_a_pace_of_their_own_have_not_paused():
    target, calls = toys.Model(), toys.inputs(9)
    with fastcache.enable(target, HALF) as cache:
        for i in range(9):
            for name, every in (("a", 1), ("b", 3)):
                if i % every == 0:
                    with cache.context(name):
                        called(target, calls[i if name == "a" else i // 3])
        assert [r.step for r in cache.stats if r.context == "b"] == [0, 1, 2]


# --- records, and what can be said ----------------------------------------------------------------


def test_contexts_without_a_call_say_so():
    target = toys.Model()
    with fastcache.enable(target, HALF) as cache:
        with pytest.warns(fastcache.FastcacheWarning, match="without a call of the model") as said:
            for i in range(8):
                with cache.context("cond", step_index=i):
                    pass
        assert len(said) == 1 and "8 contexts" in cache.summary()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "recipe", [HALF, fastcache.FirstBlockCacheConfig(0.9)], ids=["Interval", "FirstBlock"]
)
def test_a_call_can_be_told_to_compute(recipe, compiled):
    target, calls = toys.Model(), toys.inputs(6, speed=0.02)
    plain = toys.plain(toys.Model(), calls)
    with quiet(), fastcache.enable(target, recipe) as cache:
        model = fastcache.compile(target, backend="eager") if compiled else target
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i, compute=i == 3):
                out = called(model, call)
            if i == 3:
                assert (
                    torch.allclose(out, plain[3], atol=1e-6)
                    and cache.stats[-1].reason == "asked for"
                )
        assert acts(cache) == ("C.CCC." if recipe is HALF else "C..C..")
        with pytest.raises(TypeError, match="compute"):
            cache.context(compute="yes")


class Writes(toys.Model):
    """A pass at the end writes what its blocks have seen into a memory of the caller's."""

    def forward(self, hidden_states, timestep=None, memory=None):  # type: ignore[override]
        hidden = self.embed(hidden_states)
        for block in self.blocks:
            hidden = block(hidden)
            if memory is not None:
                memory.append(hidden.mean())
        return self.proj_out(hidden)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("declared", [False, True])
def test_a_pass_that_writes_the_models_own_memory_runs(declared, positional):
    calls, target, memory = toys.inputs(6), Writes(), []
    adapter = fastcache.BlockAdapter(always_compute=("memory",)) if declared else None
    with quiet(), fastcache.enable(target, Recipe(Interval(4), Reuse()), adapter=adapter) as cache:
        for i, call in enumerate(calls):
            given = memory if i in (2, 5) else None
            with torch.no_grad():
                target(*call.values(), given) if positional else target(**call, memory=given)
        assert len(memory) == 6
        assert cache.stats[2].action == cache.stats[5].action == "compute"
        if declared:
            assert cache.stats[1].action == cache.stats[3].action == "reuse"


def test_an_adapter_checks_what_always_computes():
    with pytest.raises(TypeError, match="always_compute"):
        fastcache.BlockAdapter(always_compute="memory")
