# SPDX-License-Identifier: Apache-2.0
"""A progress line of denoiser calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..policies import REUSE
from ..runtime.stats import Record, Stats


class Counted(Protocol):
    """What has records, such as a Cache."""

    stats: Stats


@contextlib.contextmanager
def progress(cache: Counted, total: int | None = None, **options: Any) -> Iterator[Any]:
    """A tqdm line that counts denoiser calls and shows how many were reused; a context manager.

    Args:
        cache: a `Cache`, whose calls are counted while the line is open.
        total: calls expected, steps times contexts, a count; None where not known.
        options: further keywords of `tqdm.tqdm`.
    Returns:
        The tqdm object, as the target of `with`.
    Raises:
        ImportError: tqdm is not installed.
    """
    bar = _tqdm()(**{"total": total, "unit": "call", "desc": "fastcache", **options})
    reused = 0

    def seen(record: Record) -> None:
        nonlocal reused
        reused += record.action == REUSE
        bar.set_postfix_str(f"reused {reused}/{bar.n + 1}", refresh=False)
        bar.update(1)

    before, cache.stats.watch = cache.stats.watch, seen
    try:
        yield bar
    finally:
        cache.stats.watch = before
        bar.close()


@contextlib.contextmanager
def work(expected: float, what: str, shown: bool) -> Iterator[Callable[[float, str], None]]:
    """A line with the share of the work that is done and the time left; a context manager.

    Args:
        expected: the work, in a unit of its own; what turns out to be more lengthens it.
        what: the name of the line.
        shown: False shows nothing, and so does a machine without tqdm.
    Returns:
        A function to call with the work that was done and what it was, as the target of `with`.
    """
    try:
        made = _tqdm() if shown else None
    except ImportError:
        made = None
    if made is None:
        yield lambda done, name: None
        return
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    bar = made(total=expected, desc=what, bar_format=form, mininterval=0.2)

    def tick(done: float, name: str) -> None:
        bar.total = max(bar.total, bar.n + done)
        bar.set_postfix_str(name, refresh=False)
        bar.update(done)

    try:
        yield tick
    finally:
        bar.close()


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "the progress line needs tqdm: pip install tqdm, or pip install 'fastcache-dit[bench]'"
        ) from error
    return tqdm
