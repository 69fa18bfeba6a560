# SPDX-License-Identifier: Apache-2.0
"""The rooms of a call: contexts, the end of a run, what is said about it, and the way that a call takes."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import toys
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache
from fastcache import sync
from fastcache.runtime.denoiser import Denoiser
from fastcache.runtime.stats import Record, known


def enabled(method: str = "mag_cache", **changes: Any) -> tuple[fastcache.Cache, Any, toys.Clock]:
    clock, target = toys.Clock(), toys.build(method)
    return fastcache.enable(target, toys.config(method, clock, **changes)), target, clock


# --- contexts -------------------------------------------------------------------------------------


def test_a_context_that_is_open_cannot_be_entered_again():
    """Looking for the innermost context went round in a circle for ever."""
    cache, target, _ = enabled()
    context, call = cache.context("cond"), toys.inputs()[0]
    with context:
        with pytest.raises(ValueError, match=r"context: .*'cond'.*open"), context:
            pass
        toys.step(target, call)
    with context:  # one after the other is no circle
        toys.step(target, call)
    assert [r.context for r in cache.stats] == ["cond", "cond"]


def test_a_request_named_none_is_refused():
    """`reset(None)` forgets all requests, so None can name none of them."""
    cache, _, _ = enabled()
    with pytest.raises(ValueError, match="context: request is None"):
        cache.context("cond", request=None)


# --- the end of a run -----------------------------------------------------------------------------


class Unread(deque):
    """Records that may be added to, and not gone through."""

    def __iter__(self) -> Any:
        raise AssertionError("all records were gone through")

    __reversed__ = __iter__


def test_the_end_of_a_run_reads_its_own_records_only():
    cache, target, _ = enabled(mag_ratios=[1.5] * toys.STEPS)
    kept, cache.stats._all = cache.stats._all, Unread()
    with pytest.warns(UserWarning, match="no step of 10 was reused"):
        for request in range(3):
            toys.run(cache, target, toys.inputs(), request=request)
            cache.reset(request)
    kept.extend(cache.stats._all[i] for i in range(len(cache.stats._all)))
    cache.stats._all = kept
    assert len(cache.stats) == 3 * toys.STEPS


def test_late_signals_are_read_at_once(monkeypatch):
    """The end of a run waits for the device once, not once per step."""
    read: list[int] = []
    monkeypatch.setattr(sync, "numbers", lambda v: read.append(len(v)) or torch.cat(v).tolist())
    one = Record(0, "cond", 0, "reuse", None, None, "")
    told = one._replace(signal=0.5)
    guided, decided = torch.tensor([0.25]), torch.tensor([0.75, 0.0], dtype=torch.float64)
    found = known([one, told, one._replace(signal=guided), one._replace(signal=decided)])
    assert read == [2] and found[:2] == [one, told]
    assert [(r.signal, r.action) for r in found[2:]] == [(0.25, "reuse"), (0.75, "compute")]
    assert known([one, told]) == [one, told] and read == [2]


class Zeroed(TorchDispatchMode):
    """Counts tensors that are overwritten with zeros."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.zero_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", toys.METHODS)
def test_storage_is_emptied_once_between_two_runs(method):
    cache, target, clock = enabled(method)
    calls = toys.inputs_for(method)
    toys.run(cache, target, calls, clock)
    (state,) = cache.denoisers[0].pool.states.values()
    held = sum(len(s.tensors()) for units in state.units for u in units.values() for s in u.streams)
    held += sum(len(group.tensors()) for group in state.slots)
    with Zeroed() as zeroed:
        cache.reset()
        assert zeroed.count == held > 0
        toys.run(cache, target, calls[:1], clock)
    assert zeroed.count == held


# --- the way of a call ----------------------------------------------------------------------------


PACKAGE = str(Path(fastcache.__file__).parent)


def short(name: str) -> str:
    """A file by its place in the package; "-" for a foreign one."""
    return name[len(PACKAGE) + 1 :] if name.startswith(PACKAGE) else "-"


def paths_of(run: Callable[[], object]) -> set[tuple[str, ...]]:
    """The files that are entered below each `Denoiser.call`, from there on down."""
    found: set[tuple[str, ...]] = set()

    def entered(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        path, at = [], frame
        while at is not None and at.f_code is not Denoiser.call.__code__:
            path.append(at.f_code.co_filename)
            at = at.f_back
        if at is not None:
            files = [Denoiser.call.__code__.co_filename, *reversed(path)]
            found.add(tuple(name for name, _ in groupby(files)))

    before = sys.getprofile()
    sys.setprofile(entered)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def returns_to(path: tuple[str, ...]) -> list[str]:
    """The files of the package that a path enters again after it has left them."""
    own = [short(name) for name in path if name.startswith(PACKAGE)]
    return sorted({name for name in own if own.count(name) > 1})


@pytest.mark.parametrize("method", toys.METHODS)
def test_a_call_goes_down_and_never_comes_back_up(method):
    """Nothing calls back: along any stack no file is entered twice, whatever runs in between."""
    clock, target = toys.Clock(), toys.build(method)
    calls = toys.inputs_for(method)
    with fastcache.enable(target, toys.config(method, clock), max_bytes=10**9) as cache:

        def run() -> None:
            toys.run(cache, target, calls, clock, num_inference_steps=toys.STEPS)
            toys.run(cache, target, calls[:6], clock)  # another run begins, none is announced
            for call in toys.inputs_for(method, seed=1)[:3]:  # without a context
                toys.step(target, call, clock)

        found = paths_of(run)
        assert {"reuse", "compute"} == {r.action for r in cache.stats}
    circles = {" > ".join(map(short, path)) for path in found if returns_to(path)}
    assert not circles, "\n".join(sorted(circles))
    seen = {short(name) for path in found for name in path}
    assert {f"runtime/{room}.py" for room in ("runs", "decision", "execution", "commit")} <= seen
    assert {"targets/decide.py", "storage/pool.py", "storage/ring.py", "policies/base.py"} <= seen


def test_a_path_that_comes_back_is_noticed():
    assert returns_to((f"{PACKAGE}/a.py", "elsewhere.py", f"{PACKAGE}/b.py")) == []
    assert returns_to((f"{PACKAGE}/a.py", "elsewhere.py", f"{PACKAGE}/a.py")) == ["a.py"]


# --- what is said ---------------------------------------------------------------------------------


def test_every_warning_is_one_of_ours_and_names_the_callers_line():
    cache, target, _ = enabled(mag_ratios=[1.5] * toys.STEPS)
    toys.run(cache, target, toys.inputs())
    with pytest.warns(fastcache.FastcacheWarning, match="no step of 10") as warned:
        cache.reset()
    assert [w.filename for w in warned] == [__file__]
    assert issubclass(fastcache.FastcacheWarning, UserWarning)


def test_the_package_warns_through_one_door():
    for path in Path(PACKAGE).rglob("*.py"):
        uses = "warnings.warn(" in path.read_text()
        assert uses == (path.name == "notices.py"), path


def test_the_log_gets_warnings_and_what_happens_to_runs(caplog):
    with caplog.at_level(logging.DEBUG, "fastcache"):
        cache, target, _ = enabled(mag_ratios=[1.5] * toys.STEPS)
        toys.run(cache, target, toys.inputs(), name="cond")
        with pytest.warns(fastcache.FastcacheWarning):
            cache.reset()
        cache.disable()
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "fastcache"]
    (warning,) = (text for level, text in said if level == "WARNING")
    assert "no step of 10 was reused" in warning
    events = " | ".join(text for level, text in said if level == "DEBUG")
    for word in ("attached", "'cond' begins", "recording", "'cond' ends", "disabled"):
        assert word in events, word


def test_a_skipped_step_logs_nothing(caplog):
    cache, target, _ = enabled(threshold=1e9, retention_ratio=0.0)
    calls = toys.inputs()
    toys.run(cache, target, calls[:2])
    with caplog.at_level(logging.DEBUG, "fastcache"):
        toys.run(cache, target, calls[2:3])
    assert cache.stats[-1].action == "reuse" and not caplog.records


def test_without_a_log_of_the_application_nothing_is_printed(capfd):
    cache, target, _ = enabled(mag_ratios=[1.5] * toys.STEPS)
    toys.run(cache, target, toys.inputs())
    with pytest.warns(fastcache.FastcacheWarning):
        cache.reset()
    assert capfd.readouterr().err == ""
