# SPDX-License-Identifier: Apache-2.0
"""What crosses between host and device in a step: counted here, where both are the same."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toys
from test_compile import Graphs, fresh
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastcache
from fastcache import (
    DMD,
    Chebyshev,
    Extrapolate,
    FirstBlock,
    Guided,
    Interval,
    Modules,
    Recipe,
    Reuse,
    Taylor,
    sync,
)
from fastcache.runtime.signature import call_signature
from fastcache.storage import history
from fastcache.storage import pool as pools
from fastcache.storage.allocate import device_of
from fastcache.storage.history import KNOWN, Staged, Timeline, facts_of, stage, staged
from fastcache.storage.pool import Slots
from fastcache.storage.ring import Ring
from fastcache.storage.state import State
from fastcache.storage.unit import Unit
from fastcache.targets import modules
from fastcache.targets.guide import GuideSlots

PACKAGE = Path(fastcache.__file__).parent
STEPS = 12
NAME = "Wan3D"
SCHEDULED: dict[str, Callable[[], Any]] = {
    "mag": lambda: fastcache.MagCacheConfig(
        mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS, retention_ratio=0.1
    ),
    "taylorseer": lambda: fastcache.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2
    ),
    "pab": lambda: fastcache.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500.0
    ),
    "faster": lambda: fastcache.FasterCacheConfig(
        is_guidance_distilled=True, current_timestep_callback=lambda: 500.0
    ),
    "taylor": lambda: Recipe(Interval(3, warmup=1), Taylor(2)),
    "guided": lambda: Recipe(Interval(4, warmup=3), Guided(2)),
    "chebyshev": lambda: Recipe(Interval(3), Chebyshev()),
    "dmd": lambda: Recipe(Interval(3), DMD()),
    "dmd of modules": lambda: Recipe(Interval(3), DMD(), Modules()),
    "balanced": lambda: fastcache.preset("balanced"),
    "quality": lambda: fastcache.preset("quality"),
    "fast": lambda: fastcache.preset("fast"),
}
LOOKING: dict[str, Callable[[], Any]] = {
    "first_block": lambda: fastcache.FirstBlockCacheConfig(0.3),
    "first_block_taylor": lambda: Recipe(FirstBlock(0.3, max_skips=2), Taylor(1)),
}


# The way that ops take on a GPU too: on CPUs one of them gives its number to the host at once.
GENERAL = "cpp" if fastcache.backends()["cpp"] is True else "reference"
# Methods whose first run may copy at every step: what is looked at comes in its own time, and a range of
# timesteps is played through with evenly spaced ones, which these are not.
UNFORESEEN = {*LOOKING, "faster"}


# --- counting ------------------------------------------------------------------------------------------------


READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "equal", "allclose")
MAKES = ("tensor", "as_tensor", "asarray", "from_numpy", "pin_memory")


class Watch(TorchFunctionMode):
    """Counts reads of tensors and tensors made of host numbers, where fastcache itself asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.makes = 0, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = getattr(function, "__name__", "")
        if name in (*READS, *MAKES) and self._asked():
            self.reads += name in READS
            self.makes += name in MAKES
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _asked() -> bool:
        """Whether the nearest code outside torch is fastcache's, other than kernels of the CPU."""
        frame: Any = sys._getframe(2)
        while frame is not None and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        where = "" if frame is None else frame.f_code.co_filename
        return where.startswith(str(PACKAGE)) and not where.endswith("backends/cpp.py")


def test_the_watch_sees_what_fastcache_asks_for() -> None:
    with Watch() as watch:
        sync.relative_change(torch.ones(2))
        sync.scalar(torch.ones(1))
        sync.same(torch.ones(1), torch.ones(1))
        assert (watch.reads, watch.makes) == (3, 0)
        stage(Timeline(2), (), 0, torch.device("cpu"))
        assert watch.makes == 4  # order, row, weights, scale
        torch.ones(1).item()  # not fastcache's own
    assert (watch.reads, watch.makes) == (3, 4)


@contextmanager
def uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list of the bytes of everything that goes from the host to the device."""
    found: list[int] = []

    def noted(values: Tensor, device: torch.device) -> Tensor:
        found.append(values.nbytes)
        return values.to(device)

    with monkeypatch.context() as patch:
        for module in (history, modules):
            patch.setattr(module, "upload", noted)
        yield found


def steps(cache: fastcache.Cache, call: Callable, inputs: dict) -> Iterator[int]:
    """A run; the numbers of its steps."""
    for i, step in enumerate(tiny.trajectory(NAME, inputs, STEPS)):
        with cache.context("cond", step_index=i, num_inference_steps=STEPS), torch.no_grad():
            call(**step, return_dict=False)
        yield i


# --- eager ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", {**SCHEDULED, **LOOKING})
def test_an_eager_step_makes_no_tensor_of_host_numbers_and_waits_only_to_look(method: str) -> None:
    model, inputs = tiny.build(NAME)
    looks = method in LOOKING
    with fastcache.enable(model, {**SCHEDULED, **LOOKING}[method](), backend=GENERAL) as cache:
        for run in range(2):
            watch = Watch()
            with watch:
                for i in steps(cache, model, inputs):
                    assert not watch.makes
                    if i:
                        assert watch.reads == looks
                    elif run:  # looks back at the run before it, once
                        assert watch.reads <= 1
                    # and the very first call sees how the blocks are driven
                    watch.reads = 0
        assert cache.stats.reused and cache.stats.computed


# --- compiled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", {**SCHEDULED, **LOOKING})
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_a_compiled_step_takes_no_copy_once_a_run_is_known_to_begin(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh()
    model, inputs = tiny.build(NAME)
    make = {**SCHEDULED, **LOOKING}[method]
    reads: list[float] = []
    look = sync.relative_change
    monkeypatch.setattr(sync, "relative_change", lambda *a: reads.append(0) or look(*a))
    with fastcache.enable(model, make()) as cache, uploads(monkeypatch) as sent:
        compiled = fastcache.compile(model, backend=Graphs())
        for run in range(2):
            for i in steps(cache, compiled, inputs):
                first = not run and (method in UNFORESEEN or not i)
                assert len(sent) <= first and sum(sent) <= 256 * (1 if i else STEPS)
                if run:
                    assert len(reads) == (method in LOOKING and i > 0)
                sent.clear()
                reads.clear()
        assert cache.stats.reused


def test_weights_of_their_own_take_one_copy_for_all_modules(monkeypatch: Any) -> None:
    """Those of a ramp change at every step."""
    fresh()
    model, inputs = tiny.build(NAME)
    weight = Extrapolate(lambda module: 0.5, ramp=(2, 8))
    with (
        fastcache.enable(model, Recipe(Interval(2, warmup=2), weight, Modules())) as cache,
        uploads(monkeypatch) as sent,
    ):
        compiled = fastcache.compile(model, backend=Graphs())
        for _ in range(2):
            counts = []
            for _ in steps(cache, compiled, inputs):
                counts.append(len([n for n in sent if n >= 3 * 4 * 4]))
                sent.clear()
        assert cache.stats.reused and max(counts) == 1


def test_facts_that_were_staged_before_are_what_the_device_holds_again() -> None:
    timeline, cpu = Timeline(3), torch.device("cpu")
    for step in range(40):
        weights = (1.0 + step % 2, -0.5, 0.25)[: len(timeline.steps)]
        stage(timeline, weights, step, cpu)
        held = timeline.staged
        rows = list(timeline.rows)
        # the oldest stands for those to come
        assert held.order.tolist() == [*rows, *(rows[-1:] or [0]) * (3 - len(rows))]
        assert held.row.tolist() == [step // 2 % 3]
        assert held.weights.tolist() == [*weights, *[0.0] * (3 - len(weights))]
        gap = 1.0 / timeline.gap(step)
        assert held.scale.tolist() == [gap] * len(rows) + [0.0] * (3 - len(rows))
        if step % 2:
            timeline.push(step)
    assert len(held.known) < 20
    for tensor in (held.order, held.row, held.weights, held.scale):
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0


@pytest.mark.parametrize("method", ["taylorseer", "taylor", "quality"])
def test_a_run_of_another_length_is_foreseen_too(method: str, monkeypatch: Any) -> None:
    """And one that goes otherwise than planned copies what it needs."""
    fresh()
    model, inputs = tiny.build(NAME)
    with fastcache.enable(model, SCHEDULED[method]()) as cache, uploads(monkeypatch) as sent:
        compiled = fastcache.compile(model, backend=Graphs())
        for total in (9, 7, 9, 7):
            for i, step in enumerate(tiny.trajectory(NAME, inputs, total)):
                with (
                    cache.context("cond", step_index=i, num_inference_steps=total),
                    torch.no_grad(),
                ):
                    compiled(**step, return_dict=False)
                assert len(sent) <= (not i)
                sent.clear()
            cache.reset()


def test_what_is_foreseen_is_what_is_staged() -> None:
    held, cpu = Timeline(2), torch.device("cpu")
    played = Timeline(2)
    told = []
    for step in range(6):
        told.append(facts_of(played, (1.0,) if step % 2 else (), step))
        if step % 2 == 0:
            played.push(step)
    staged(held, cpu).foresee(told)
    assert len(held.staged.known) == len(set(told)) and held.staged.foreseen == 6
    want = Timeline(2)
    for step in range(6):
        weights = (1.0,) if step % 2 else ()
        known = len(held.staged.known)
        stage(held, weights, step, cpu)
        assert len(held.staged.known) == known
        stage(want, weights, step, cpu)
        assert torch.equal(held.staged.packed, want.staged.packed)
        if step % 2 == 0:
            held.push(step), want.push(step)


def test_what_is_foreseen_has_an_end_too() -> None:
    held = Staged(1, torch.device("cpu"))
    held.foresee([((0,), (0,), (float(i),), (1.0,)) for i in range(2 * KNOWN)])
    assert len(held.known) == KNOWN


def test_what_is_known_has_an_end() -> None:
    held = Staged(1, torch.device("cpu"))
    for i in range(2 * KNOWN + 5):
        held.write((0,), (0,), (float(i),), (1.0,))
        assert held.weights.tolist() == [i] and len(held.known) <= KNOWN


def test_numbers_written_into_a_state_are_written_again_after_a_restart() -> None:
    state, held = State((0, "a"), 1), GuideSlots()
    state.slots = [held]
    held.prior = torch.zeros(2)
    held.put("prior", (2.0, 0.5))
    held.put("prior", (3.0, 0.5))
    assert held.prior.tolist() == [3.0, 0.5]
    state.restart()
    assert held.prior.tolist() == [0.0, 0.0]
    held.put("prior", (3.0, 0.5))
    assert held.prior.tolist() == [3.0, 0.5]


# Functions of the runtime that make tensors of host numbers: `upload` takes what they make.
MAKERS = {("storage/history.py", "_packed"), ("targets/modules.py", "_stage_weights")}
ELSEWHERE = (
    "sync.py",  # what ranks tell each other
    "configs/",  # ratios, when a config is made
    "calibration/",
    "demo/",
    "tuning/",  # pictures, after a run
)


def test_nothing_else_makes_tensors_of_host_numbers() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        where = str(path.relative_to(PACKAGE))
        if where.startswith(ELSEWHERE):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and node.attr in MAKES[:-1]:
                        if getattr(node.value, "id", "") == "torch":
                            found.add((where, function.name))
    assert found == MAKERS


# --- devices and streams -------------------------------------------------------------------------------------


def test_a_call_runs_on_its_accelerator_whatever_comes_first() -> None:
    timestep, latents = torch.ones(1), torch.ones(1, 4, 4, device="meta")
    assert device_of(call_signature((timestep, latents), {})) == latents.device
    assert device_of(call_signature((), {"timestep": timestep, "x": [latents]})) == latents.device
    assert device_of(call_signature((timestep,), {})) == device_of(()) == torch.device("cpu")


class Stream:
    """Notes which streams it waits for."""

    def __init__(self) -> None:
        self.waits: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)


def test_storage_that_changes_streams_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for CUDA, which there is none of here."""
    first, second = Stream(), Stream()
    now, handed = [first], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(Tensor, "record_stream", lambda t, s: handed.append((t, s)), raising=False)
    device = torch.device("meta")
    signature = ((torch.Size([2, 4]), torch.float32, device),)
    pool = Slots([Reuse().depth])
    pool.streams = True

    one = pool.add((0, "a"))
    pool.adopt(one, signature)
    unit = one.units[0]["block"] = Unit()
    unit.streams = [Ring(torch.empty(2, 4, device=device), one.timelines[0])]
    pools.follow(one)
    assert one.stream is first and not first.waits and not handed
    pool.forget((0, "a"))  # which empties it
    assert not first.waits
    now[0] = second
    other = pool.add((1, "a"))
    pool.adopt(other, signature)
    pools.follow(other)
    assert other.units[0] is not one.units[0] and other.tensors()
    assert second.waits == [first] and [s for _, s in handed] == [second]
    pools.follow(other)
    assert second.waits == [first]  # the stream that used it last is this one now
    now[0] = first
    monkeypatch.setattr(pools, "on_host", lambda t: t)
    pool.send_away(other)  # by another request, on its stream
    assert first.waits == [second] and other.stream is first
    now[0] = second
    pool.bring_back(other, device)
    assert second.waits == [first, first]


def test_a_spare_is_emptied_once() -> None:
    target = toys.Model()
    with fastcache.enable(target, Recipe(Interval(2), Reuse())) as cache:
        toys.run(cache, target, toys.inputs())
        cache.reset()
        pool = cache.denoisers[0].pool
        (spare,) = pool.spares
        held = [(t, t._version) for t in spare.tensors()]
        assert held and not any(t.any() for t, _ in held)
        pool.adopt(taken := pool.add((1, "default")), spare.signature)
        assert taken.units is spare.units
        assert all(t._version == before for t, before in held)
