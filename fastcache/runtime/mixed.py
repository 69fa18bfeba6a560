# SPDX-License-Identifier: Apache-2.0
"""One call of a model whose samples belong to different requests, at steps and with decisions of their own.

Each sample is located and decided by itself, as a call of its own would be. Those that compute then go through the
model together, as a smaller batch, and so do those that reuse; a batch that agrees is one call. Samples that decide
inside the stack enter it together: where they agree, that call goes on; else it was their head, and those that compute
and those that reuse each go on from it in a call of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..policies import COMPUTE, REUSE
from ..storage.allocate import NoRoom, Unfit
from ..storage.state import State
from ..storage.together import Group
from ..targets.control import PENDING, REST, WHOLE, Stop
from .context import Context
from .denoiser import Denoiser
from .frames import OWN
from .notices import LOG
from .runs import abandon

Gather = Callable[[Sequence[int]], dict[str, Any]]  # keywords of a call for some of the samples
Part = tuple[Sequence[int], Any]  # places of samples, and what the model returned for them


class Sample:
    """One sample of a batch: the context of its call, the run that this lies in, and the call it would be alone."""

    def __init__(self, place: int, context: Context, run: Any, kwargs: dict[str, Any]) -> None:
        self.place, self.context, self.run, self.kwargs = place, context, run, kwargs
        self.denoiser: Any = None
        self.state: Any = None

    @property
    def key(self) -> Any:
        """Request and context that it is meant for."""
        request = self.context.asked
        if request is OWN and self.run is not None:
            request = self.run.request
        return request, self.context.name

    def decide(self, own: Denoiser) -> None:
        """Find out which step it is and what becomes of it. own: the model's, by the cache's own recipe."""
        if self.run is not None:
            self.run.resume()
        self.context.push()
        try:
            self.denoiser = denoiser = own if own.switch is None else own.switch.meant()
            self.state, step = denoiser.runs.locate(self.context, (), self.kwargs)
            denoiser.decider.decide(self.state, step, (), self.kwargs)
        finally:
            self.context.pop()
            if self.run is not None:
                self.run.pause()
        self.note()

    def note(self) -> None:
        """Take over what the control holds."""
        control = self.denoiser.control
        self.step, self.batch = control.step, control.batch
        self.decisions, self.actions = list(control.decisions), list(control.actions)
        self.weights = list(control.weights)

    def arm(self) -> None:
        """Have the control hold what was decided."""
        control = self.denoiser.control
        control.state, control.step, control.batch = self.state, self.step, self.batch
        control.phase = WHOLE
        control.decisions[:], control.actions[:] = self.decisions, self.actions
        control.weights[:] = self.weights

    @property
    def joins(self) -> bool:
        """Whether it may go with others, as far as its step says."""
        executor, state = self.denoiser.executor, self.state
        if self.step.again or state.out_of_memory:
            return False
        budget = executor.budget
        return not (budget and budget.refuses(executor.pool, state, executor.group, state.device))

    def alone(self) -> Part:
        """Run it as a call of its own."""
        self.arm()
        denoiser = self.denoiser
        if denoiser.control.may_be_compiled:
            denoiser.ahead.upload(self.state)
        output = denoiser.executor.execute(self.state, (), self.kwargs, None)
        denoiser.committer.commit(self.state, self.step)
        return [self.place], output


def call_mixed(own: Denoiser, samples: Sequence[Sample], gather: Gather) -> list[Part]:
    """Call a model for a batch. What it returns comes in parts.

    own: the model's denoiser, by the cache's own recipe. An exception forgets the runs of all requests of the batch.
    """
    with own.lock:
        parts: list[Part] = []
        try:
            for sample in samples:
                sample.decide(own)
            for denoiser in dict.fromkeys(sample.denoiser for sample in samples):
                if own.switch is not None:
                    own.switch.hook(denoiser)
                members = [sample for sample in samples if sample.denoiser is denoiser]
                parts += _run(denoiser, members, gather)
        except BaseException:
            for sample in samples:
                settings = (sample.denoiser or own).settings
                abandon(settings.pools, sample.context.request)
            raise
        for denoiser in dict.fromkeys(sample.denoiser for sample in samples):
            denoiser.notify()
    return parts


def _run(denoiser: Denoiser, samples: Sequence[Sample], gather: Gather) -> list[Part]:
    """The samples of one recipe: those that do the same go together where they can, the others alone."""
    parts: list[Part] = []
    rest, grouped = list(samples), []
    eager = not (denoiser.control.may_be_compiled or torch.is_grad_enabled())
    if eager and len(denoiser.targets) == 1 and not denoiser.executor.wrappers:
        grouped = [sample for sample in samples if sample.joins]
    for action in (COMPUTE, REUSE, PENDING):
        alike = [sample for sample in grouped if sample.actions == [action]]
        new = [s for s in alike if not denoiser.targets[0].recorded(s.state)]
        if new and _like(new[0]) is None:  # the first call of its kind shows how the model runs
            parts.append(new[0].alone())
            alike.remove(new[0])
            rest.remove(new.pop(0))
        if new and (other := _like(new[0])) is not None:
            for sample in new:
                denoiser.targets[0].prepare_like(sample.state, other)
        if len(alike) > 1:
            found = _together(denoiser, alike, gather)
            served = {place for places, _ in found for place in places}
            rest = [sample for sample in rest if sample.place not in served]
            parts += found
    return parts + [sample.alone() for sample in rest]


def _like(sample: Sample) -> State | None:
    """A state that has storage for calls such as this one."""
    denoiser, signature = sample.denoiser, sample.state.signature
    states, target = denoiser.pool.states.values(), denoiser.targets[0]
    return next((s for s in states if s.signature == signature and target.recorded(s)), None)


def _together(
    denoiser: Denoiser, samples: Sequence[Sample], gather: Gather, head: Group | None = None
) -> list[Part]:
    """One call for samples that do the same, or two more where they decide inside and differ; none for those that
    cannot be told apart in it.

    head: of a call that has run the first blocks for these samples and others.
    """
    target, control = denoiser.targets[0], denoiser.control
    places = [sample.place for sample in samples]
    group: Any = target.together(samples, head)
    if group is None:
        return []
    samples[0].arm()
    parted, control.inside, control.phase = False, True, WHOLE if head is None else REST
    try:
        with target.serving(group) as recorded, denoiser.executor.backend():
            if not recorded:
                return []
            output = denoiser.executor.original(**gather(places))
            action = control.actions[0]
            if action == REUSE and control.predicted != target.segments:
                return []
            if action == COMPUTE:
                target.commit(group, COMPUTE)
                group.settle(target.rule)
    except Stop:
        parted = True
    except (Unfit, NoRoom) as error:
        LOG.debug("samples do not go together: %s", error)
        return []
    finally:
        control.inside = control.active = False
    if parted:
        kinds = [[s for s in samples if s.actions == [action]] for action in (COMPUTE, REUSE)]
        return [part for alike in kinds for part in _together(denoiser, alike, gather, group)]
    for sample in samples:
        sample.arm()
        sample.state.uncached_step = False
        denoiser.committer.commit(sample.state, sample.step)
    return [(places, output)]
