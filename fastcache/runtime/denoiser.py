# SPDX-License-Identifier: Apache-2.0
"""One model under a cache, as a way through rooms: locate, decide, execute, commit, notify."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..models.adapter import BlockAdapter
from ..models.registry import keeps, may_keep
from ..ops import dispatch
from ..recipe import Recipe
from ..storage.pool import Slots
from ..storage.state import State
from ..sync import ranks_of
from ..targets.bind import bind_rules
from .ahead import Ahead
from .commit import Committer
from .compiling import listeners, watch_compiling
from .decision import Decider
from .execution import Executor
from .frames import Frame, Owner, innermost, latest, thread_request
from .notices import LOG, warn
from .patch import ForwardPatch, place_of
from .runs import Runs, abandon
from .settings import Settings
from .stats import known
from .trips import ALL
from .uses import Uses
from .verdict import other_length, verdict


def on_model(recipe: Recipe, model: nn.Module) -> Recipe:
    """A recipe with what its policies leave to the model filled in, by the names of its classes."""
    classes = [kind.__name__ for kind in type(model).__mro__]
    rules = [replace(rule, when=rule.when.on_model(classes)) for rule in recipe.rules]
    return Recipe.of(rules, recipe.name, recipe.made_for)


class Denoiser:
    """One model with the rules bound to it.

    Args:
        owner: whose contexts its calls are in.
        settings: what it shares with the other denoisers of the cache.
        name: of the model in its pipeline.
        model: the model; nothing in it is changed before `install`.
        recipe: the rules.
        adapter: how its blocks are found and driven.

    Raises:
        ValueError: where nothing fits, see `bind_rules`.
    """

    def __init__(
        self,
        owner: Owner,
        settings: Settings,
        name: str,
        model: nn.Module,
        recipe: Recipe,
        adapter: BlockAdapter,
    ) -> None:
        self.owner, self.settings, self.name, self.model = owner, settings, name, model
        recipe = on_model(recipe, model)
        self.adapter, self.lock = adapter, settings.lock
        bound = bind_rules(
            model,
            recipe.rules,
            adapter,
            ranks_of(settings.process_group, settings.ranks),
            settings.cache_dtype,
        )
        self.control, self.targets = bound.control, bound.targets
        for nothing in bound.missing.values():
            warn(f"fastcache: {nothing}")
        fitting = [rule for i, rule in enumerate(recipe.rules) if i not in bound.missing]
        self.recipe = Recipe.of(fitting, recipe.name, recipe.made_for)
        self.pool = Slots(
            [rule.what.depth for rule in fitting],
            [target.decider.new_slots for target in bound.targets],
        )
        _, self.original = place_of(model)
        self.may_keep = may_keep(self.original)
        control, targets, pool = self.control, self.targets, self.pool
        self.executor = Executor(settings, model, self.original, bound, pool)
        self.runs = Runs(settings, name, model, self.recipe, adapter, pool, targets)
        uses = Uses(self.recipe)
        self.decider = Decider(settings, self.recipe, control, targets, uses)
        self.committer = Committer(settings, name, self.recipe, control, targets, pool, uses)
        rooms = self.runs, self.decider, self.executor, self.committer
        self.ahead = Ahead(owner, settings, name, self.recipe, self.original, control, rooms)
        self.patch = ForwardPatch(
            model, self, owner, (self.call, self.ahead.traced, self.untraced, self.reset)
        )
        # bound once: each call goes through all of them
        self._locate, self._decide = self.runs.locate, self.decider.decide
        self._execute, self._commit = self.executor.execute, self.committer.commit
        self._waiting = settings.notices.waiting
        self.switch: Any = None  # a Switch, once runs have had recipes of their own
        self.ended = False  # no call comes any more

    def call(self, args: tuple, kwargs: dict, run: Callable | None = None) -> Any:
        """The model's forward with the cache in charge. `run` stands in for it in compiled calls."""
        with self.lock:
            control = self.control
            if control.inside or (self.may_keep and keeps(kwargs)):
                return self._past(args, kwargs)
            frame: Any = latest()
            if frame is not None and frame.cache is not self.owner:
                frame = innermost(self.owner)
            if frame is None or not frame.one_call:
                watch_compiling()
            if (told := self.owner.told) is not None:
                frame = told(frame)
            try:
                if self.ahead.prepared is None:
                    state, step = self._locate(frame, args, kwargs)
                    self._decide(state, step, args, kwargs)
                else:
                    state, step = self._prepared(frame, args, kwargs)
                if control.may_be_compiled:
                    self.ahead.upload(state)
                output = self._execute(state, args, kwargs, run)
            except BaseException:
                abandon(self.settings.pools, thread_request() if frame is None else frame.request)
                raise
            self._commit(state, step)
            if self.pool.ended or self._waiting:
                self.notify()
            return output

    def _past(self, args: tuple, kwargs: dict) -> Any:
        """A call that is no step: the model calls itself inside its own forward, or fills a cache of its own."""
        if not self.control.inside:
            self.ahead.withdraw()
        return self.original(*args, **kwargs)

    def _prepared(self, frame: Frame | None, args: tuple, kwargs: dict) -> tuple[State, Any]:
        """The step of a call that a context has looked at before."""
        state, step = self.ahead.take(frame, args, kwargs)
        if state is not None:
            return state, step
        state, step = self._locate(frame, args, kwargs, told=step)
        self._decide(state, step, args, kwargs)
        return state, step

    def untraced(self, args: tuple, kwargs: dict) -> Any:
        """The model's forward where torch.compile(model) could not trace it: all of it runs uncompiled."""
        self.ahead.note_untraced()
        return self.patch.call(args, kwargs)

    def notify(self) -> None:
        """Account for runs that are over, and say what there is to say, now that a warning made an error of
        would break nothing."""
        self.account()
        self.settings.notices.emit()

    def account(self) -> None:
        """Once per finished run and context: keep what was calibrated, or note that the cache did nothing."""
        ended = self.pool.ended
        while ended:
            run = ended.pop(0)
            LOG.debug("run of request %r, context %r ends", *run.key)
            if run.measured:
                key = (self.name, run.key[1])
                self.settings.calibrated.setdefault(key, []).append((run.measured, run.computed))
                continue
            records = known(run.records)
            if said := other_length(run.total or len(records), self.recipe):
                self.settings.notices.later(said, f"fastcache: {said}")
            kind, message = verdict(records, self.recipe)
            if message:
                self.settings.notices.later(kind, f"fastcache: {message}")

    def measured(self) -> Iterator[tuple[tuple[str, str], list[Tensor], int]]:
        """What calibrating runs that still go on have measured."""
        for state in self.pool.states.values():
            if state.index and state.measured:
                yield (self.name, state.key[1]), state.measured, state.timelines[0].pushes

    def forget(self, request: Any = ALL) -> None:
        """Forget the runs of one request, or all; their storage serves the next ones."""
        with self.lock:
            self.runs.reset(request)
            self.account()

    def reset(self, request: Any = ALL) -> None:
        """The same, and say what there is to say."""
        self.forget(request)
        self.settings.notices.emit()

    def install(self) -> None:
        """Take the model's calls. What was done is undone by `remove`, also after a failure half way."""
        self.patch.put_on()
        self.hook()
        self.watch()

    def remove(self) -> None:
        """Give the model back as it was. Its own targets stand in it, or none."""
        self.end()
        self.unhook()
        self.patch.take_off()

    def hook(self) -> None:
        """Have the targets stand in the model."""
        for target in self.targets:
            target.install()

    def unhook(self) -> None:
        """Take them out again. What is remembered stays."""
        for target in reversed(self.targets):
            target.remove()

    def watch(self) -> None:
        """Be told of graphs that begin, and of kernels that the reference stands in for."""
        self.ended = False
        listeners.add(self.ahead)
        dispatch.watchers.add(self.executor)

    def end(self) -> None:
        """No call comes any more: account for all runs, and let go of storage."""
        self.ended = True
        listeners.discard(self.ahead)
        dispatch.watchers.discard(self.executor)
        for state in self.pool.states.values():
            self.pool.end_run(state)
        self.account()
        self.pool.clear()
        self.control.state = None
