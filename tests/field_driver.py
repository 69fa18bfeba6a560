# SPDX-License-Identifier: Apache-2.0
"""What a caller does, call by call."""

from __future__ import annotations

import contextlib
import contextvars
import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from field_callers import PROMPTS, Caller, Loop, User, latents, pauses_of, slice_of, times
from field_stage import Pipeline, Turns
from field_world import KINDS, Interrupted, Truth, World, far
from torch import Tensor

import fastcache


class Driver:
    """A caller under a cache."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.world = World(KINDS[caller.kind], caller.works)
        self.rng = random.Random(caller.seed + 1)
        self.runs = 0
        self.turns = Turns()
        experts = any(u.experts > 1 for u in caller.users)
        models = self.world.models if experts else self.world.models[:1]
        self.pipeline = Pipeline(models, self.turns.give_way)
        self.announces = any(u.announced == "pipeline" for u in caller.users)

    def play(self) -> World:
        caller = self.caller
        target = self.pipeline if self.announces else self.world.models[0]
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", fastcache.FastcacheWarning)
            with fastcache.enable(target, self.world.kind.recipe) as self.cache:
                acts = [self.user(u) for u in caller.users]
                if caller.mode == "alone":
                    for act in acts:
                        for _ in act:
                            pass
                elif caller.mode == "tasks":
                    tasks = [(contextvars.copy_context(), act) for act in acts]
                    while tasks:
                        task = self.rng.choice(tasks)
                        try:
                            task[0].run(next, task[1])
                        except StopIteration:
                            tasks.remove(task)
                else:
                    self.turns.play(acts, self.rng)
        return self.world

    def user(self, user: User) -> Iterator[None]:
        """All generations of a user; gives way after every call."""
        kept = self.conditions(user)
        for loops, dtype in zip(user.generations, user.dtypes, strict=True):
            if user.fresh_conditions:
                kept = self.conditions(user)
            calls = self.generation(user, loops, dtype, kept)
            try:
                if user.announced == "pipeline":
                    self.pipeline(calls)
                    yield
                elif user.announced == "run":
                    total = loops[0].steps if user.lengths and len(loops) == 1 else None
                    with self.cache.run(num_inference_steps=total):
                        yield from calls
                else:
                    yield from calls
            except Interrupted:
                yield

    def generation(
        self, user: User, loops: list[Loop], dtype: torch.dtype, kept: dict[str, Any]
    ) -> Iterator[None]:
        for loop in loops:
            self.runs += 1
            yield from self.loop(user, loop, dtype, kept, self.runs, len(loops))

    def loop(
        self, user: User, loop: Loop, dtype: torch.dtype, kept: dict, run: int, loops: int
    ) -> Iterator[None]:
        caller, piped = self.caller, user.announced == "pipeline"
        index, timestep, bar = caller.tells
        values = times(loop.steps, caller, self.rng)
        every = [v for i, v in enumerate(values) for _ in range(user.order if i else 1)]
        whole = self.placed(torch.tensor(every))
        pipe = self.pipeline
        if piped:
            scheduler = pipe.scheduler
            scheduler.order, scheduler.timesteps = user.order, whole
            vars(scheduler).pop("_step_index", None)
            if index:
                scheduler._step_index = None
            pipe._num_timesteps = len(every)
            vars(pipe).pop("_current_timestep", None)
        pauses = dict(user.pauses)
        if user.pauses_change:
            pauses = pauses_of(user.branches, self.rng)
        told = user.named in ("name", "index")
        if not told and user.experts > 1:
            pauses = {}
        if not told or user.announced == "nothing":
            pauses = {name: (max(begin, 1), end) for name, (begin, end) in pauses.items()}
        seed = 7 * self.rng.randrange(50)
        shared = self.placed(latents(user, dtype, seed, 0))
        bars = pipe.progress_bar(total=len(every)) if piped and bar else contextlib.nullcontext()
        with bars:
            for at, t in enumerate(every):
                step = values.index(t)
                if step == loop.stop and loop.how in ("between", "silence"):
                    if loop.how == "between":
                        raise Interrupted
                    return
                if piped and timestep:
                    pipe._current_timestep = whole[at]
                shared = self.latents(user, shared, dtype, seed, at)
                around: Any = contextlib.nullcontext()
                if user.named == "around":
                    around = self.cache.context("mine", **named(user))
                with around:
                    for name in user.branches:
                        begin, end = pauses.get(name, (0, 0))
                        if begin <= step < end:
                            continue
                        fails = step == loop.stop and loop.how == "in"
                        which = int(user.experts > 1 and step >= (loop.steps + 1) // 2)
                        truth = self.truth(
                            user, loop, run, name, step, which, float(whole[at]), loops
                        )
                        call = {
                            "hidden_states": slice_of(shared, name, user),
                            "timestep": self.form(whole, at, user.batches[name]),
                            "encoder_hidden_states": self.condition(user, kept, name, at),
                        }
                        with self.context(user, name, step, loop):
                            self.world.call(truth, call, which, fails)
                        if user.named != "around":
                            yield
                if user.named == "around":
                    yield
                if piped and index:
                    scheduler._step_index = at + 1
            if piped and timestep:
                pipe._current_timestep = None

    def context(self, user: User, name: str, step: int, loop: Loop) -> Any:
        if user.named == "index":
            total = loop.steps if user.lengths and user.experts == 1 else None
            return self.cache.context(
                name, step_index=step, num_inference_steps=total, **named(user)
            )
        if user.named == "name":
            return self.cache.context(name, **named(user))
        return contextlib.nullcontext()

    def truth(
        self,
        user: User,
        loop: Loop,
        run: int,
        name: str,
        step: int,
        which: int,
        t: float,
        loops: int,
    ) -> Truth:
        """What is so, and whether the cache can know all of it."""
        caller = self.caller
        total = None
        if user.named == "index" and user.lengths and user.experts == 1:
            total = loop.steps
        told = user.named == "index" or (user.named == "name" and user.announced == "pipeline")
        planned = told and user.experts == 1 and user.order == 1
        planned = planned and (user.announced != "run" or loops == 1)
        if KINDS[caller.kind].timed:
            planned = planned and (caller.place == "host" or user.announced != "pipeline")
            planned = planned and not (caller.form == "tokens" and caller.rising)
        if user.announced == "pipeline":
            planned = planned and caller.tells[2] and user.named == "index"
            total = loop.steps
        elif user.announced == "run" and user.lengths and loops == 1 and total is None:
            total = loop.steps
        time = t
        key = (user.number, run, name, which)
        return Truth(key, step, planned, total, time)

    def form(self, whole: Tensor, at: int, batch: int) -> Any:
        """The timestep as the caller gives it."""
        form, value = self.caller.form, float(whole[at])
        if form == "view":
            return whole[at]
        if form == "view of one":
            return whole[at : at + 1]
        if form == "expanded":
            return whole[at].expand(batch)
        if form == "fresh":
            return self.placed(torch.tensor(value))
        if form == "fresh of one":
            return self.placed(torch.tensor([value]))
        if form == "samples":
            return self.placed(torch.full((batch,), value))
        if form == "tokens":
            clean = self.caller.scale if self.caller.rising else 0.0
            return self.placed(torch.tensor([[clean, value, value]]).expand(batch, 3).clone())
        return value

    def latents(self, user: User, shared: Tensor, dtype: torch.dtype, seed: int, at: int) -> Tensor:
        """Those of a step, which all branches share."""
        now = self.placed(latents(user, dtype, seed, at))
        if user.latents == "in place":
            return shared.copy_(now)
        return now

    def placed(self, value: Tensor) -> Tensor:
        """A tensor where the caller keeps its own."""
        return far(value) if self.caller.place == "device" else value

    def conditions(self, user: User) -> dict[str, Tensor]:
        """Those of the branches of a generation."""
        prompt = 1000.0 * self.rng.randrange(1, 30)
        return {n: self.placed(torch.full((1, 2), prompt + 100 * i)) for i, n in enumerate(PROMPTS)}

    def condition(self, user: User, kept: dict[str, Any], name: str, at: int) -> Any:
        held = kept[name if name in PROMPTS else "cond"]
        if user.conditions == "none":
            return None
        if user.conditions == "same":
            return held
        if user.conditions == "copies":
            return held.clone()
        return held + at


def named(user: User) -> dict[str, Any]:
    return {} if user.request is None else {"request": user.request}
