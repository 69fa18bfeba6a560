# SPDX-License-Identifier: Apache-2.0
"""What callers call: a pipeline as diffusers has them, and threads that take turns."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch


class Scheduler:
    def __init__(self, order: int) -> None:
        self.order = order
        self.config = SimpleNamespace(num_train_timesteps=1000)
        self.timesteps: Any = None


class Pipeline:
    """As diffusers has them: a scheduler, a progress bar, a call."""

    def __init__(self, models: list[Any], give_way: Callable[[], None]) -> None:
        self.transformer, self.scheduler = models[0], Scheduler(1)
        self.give_way = give_way
        if len(models) > 1:
            self.transformer_2 = models[1]

    @contextlib.contextmanager
    def _bar(self) -> Iterator[None]:
        yield

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        return self._bar()

    def __call__(self, calls: Iterator[None]) -> None:
        for _ in calls:
            self.give_way()


class Turns:
    """Threads that take turns, one call each, in an order that the seed decides."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.main = threading.Semaphore(0)
        self.error: BaseException | None = None

    def give_way(self) -> None:
        turn = getattr(self.here, "turn", None)
        if turn is not None:
            self.main.release()
            turn.acquire()

    def play(self, acts: list[Iterator[None]], rng: random.Random) -> None:
        alive: list[tuple[threading.Thread, threading.Semaphore]] = []

        def live(act: Iterator[None], turn: threading.Semaphore) -> None:
            self.here.turn = turn
            turn.acquire()
            try:
                with torch.no_grad():
                    for _ in act:
                        self.give_way()
            except BaseException as error:
                self.error = error
            done.add(threading.current_thread())
            self.main.release()

        done: set[threading.Thread] = set()
        for act in acts:
            turn = threading.Semaphore(0)
            thread = threading.Thread(target=live, args=(act, turn))
            thread.start()
            alive.append((thread, turn))
        while alive:
            chosen = rng.choice(alive)
            chosen[1].release()
            self.main.acquire()
            if chosen[0] in done:
                chosen[0].join()
                alive.remove(chosen)
        if self.error is not None:
            raise self.error
