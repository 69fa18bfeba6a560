# SPDX-License-Identifier: Apache-2.0
"""One call of a model whose samples belong to different requests, at steps and with decisions of their own.

Each sample is located and decided by itself, as a call of its own would be. Those that compute then go through the
model together, as a smaller batch, and so do those that reuse; a batch that agrees is one call. Samples that decide
inside the stack enter it together: where they agree, that call goes on; else it was their head, and those that compute
and those that reuse each go on from it in a call of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

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
# Of the batches that are compiled: larger ones are split, and a last sample goes alone.
SIZES = (8, 4, 2)


class Programs(Protocol):
    """What stands in for the forward of a denoiser once storage exists. batches: also for several requests at once."""

    batches: bool

    def run(self, *args: Any, **kwargs: Any) -> Any: ...


ProgramsOf = Callable[[Denoiser], Programs]


class Sample:
    """One sample of a batch: the context of its call, the run that this lies in, and the call it would be alone."""

    def __init__(self, place: int, context: Context, run: Any, kwargs: dict[str, Any]) -> None:
        self.place, self.context, self.run, self.kwargs = place, context, run, kwargs
        self.denoiser: Any = None
        self.state: Any = None
        self.programs: Programs | None = None

    @property
    def key(self) -> Any:
        """Request and context that it is meant for."""
        request = self.context.asked
        if request is OWN and self.run is not None:
            request = self.run.request
        return request, self.context.name

    def decide(self, own: Denoiser, programs_of: ProgramsOf | None) -> None:
        """Find out which step it is and what becomes of it. own: the model's, by the cache's own recipe."""
        if self.run is not None:
            self.run.resume()
        self.context.push()
        try:
            self.denoiser = denoiser = own if own.switch is None else own.switch.meant()
            self.programs = None if programs_of is None else programs_of(denoiser)
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
        if self.step.again or state.without:
            return False
        budget = executor.budget
        return not (budget and budget.refuses(executor.pool, state, executor.group, state.device))

    @property
    def measurable(self) -> bool:
        """Whether there is something that what it shows inside the model can be held against."""
        self.arm()
        found: bool = self.denoiser.targets[0].decider.prepare_head(self.state)
        return found

    @property
    def ready(self) -> bool:
        """Whether it has storage, and the device holds what compiled code has to know of its step."""
        self.arm()
        if self.denoiser.control.may_be_compiled:
            self.denoiser.ahead.upload(self.state)
        return not self.state.without

    def alone(self) -> Part:
        """Run it as a call of its own."""
        denoiser = self.denoiser
        self.arm()
        if denoiser.control.may_be_compiled:
            denoiser.ahead.upload(self.state)
        run = None if self.programs is None else self.programs.run
        output = denoiser.executor.execute(self.state, (), self.kwargs, run)
        denoiser.committer.commit(self.state, self.step)
        return [self.place], output


def call_mixed(
    own: Denoiser,
    samples: Sequence[Sample],
    gather: Gather,
    programs_of: ProgramsOf | None = None,
) -> list[Part]:
    """Call a model for a batch. What it returns comes in parts.

    own: the model's denoiser, by the cache's own recipe. programs_of: what stands in for the forward of a denoiser
    whose model is compiled. An exception forgets the runs of all requests of the batch.
    """
    with own.lock:
        parts: list[Part] = []
        try:
            for sample in samples:
                sample.decide(own, programs_of)
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
    target, programs = denoiser.targets[0], samples[0].programs
    grouped = (
        [sample for sample in samples if sample.joins] if _may_join(denoiser, programs) else []
    )
    # room for some may have been made by others of them
    grouped = [s for s in grouped if not (s.state.away or s.state.evicted or s.state.without)]
    for action in (COMPUTE, REUSE, PENDING):
        alike = [sample for sample in grouped if sample.actions == [action]]
        new = [sample for sample in alike if not target.recorded(sample.state)]
        if new and _like(new[0]) is None:  # the first call of its kind shows how the model runs
            parts.append(new[0].alone())
            alike.remove(new.pop(0))
        if new and (other := _like(new[0])) is not None:
            for sample in new:
                target.prepare_like(sample.state, other)
        if programs is not None and action == PENDING:
            # no program measures what there is nothing to hold against
            first = [sample for sample in alike if not sample.measurable]
            parts += _together(denoiser, first, gather, denoiser.executor.original)
            alike = [sample for sample in alike if sample not in first]
        parts += _in_calls(denoiser, alike, gather)
    served = {place for places, _ in parts for place in places}
    return parts + [sample.alone() for sample in samples if sample.place not in served]


def _may_join(denoiser: Denoiser, programs: Programs | None) -> bool:
    """Whether samples of this recipe may go together at all."""
    if torch.is_grad_enabled() or len(denoiser.targets) > 1 or denoiser.executor.wrappers:
        return False
    return not denoiser.control.may_be_compiled or (programs is not None and programs.batches)


def _in_calls(
    denoiser: Denoiser, samples: Sequence[Sample], gather: Gather, head: Group | None = None
) -> list[Part]:
    """One call for samples that do the same; compiled, calls of few sizes, so that there are few programs."""
    programs, parts, at = (samples[0].programs if samples else None), list[Part](), 0
    if programs is None:
        return _together(denoiser, samples, gather, denoiser.executor.original, head)
    for size in (*SIZES, 1):
        while len(samples) - at >= size:
            parts += _together(denoiser, samples[at : at + size], gather, programs.run, head)
            at += size
    return parts


def _like(sample: Sample) -> State | None:
    """A state that has storage for calls such as this one."""
    denoiser, signature = sample.denoiser, sample.state.signature
    states, target = denoiser.pool.states.values(), denoiser.targets[0]
    return next((s for s in states if s.signature == signature and target.recorded(s)), None)


def _together(
    denoiser: Denoiser,
    samples: Sequence[Sample],
    gather: Gather,
    forward: Callable[..., Any],
    head: Group | None = None,
) -> list[Part]:
    """One call for samples that do the same, or two more where they decide inside and differ; none for those that
    cannot be told apart in it.

    forward: the model's, or what stands in for it. head: of a call that has run the first blocks for these samples
    and others.
    """
    target, control = denoiser.targets[0], denoiser.control
    places = [sample.place for sample in samples]
    if len(samples) < 2 and head is None:
        return []
    group: Any = target.together(samples, head)
    if group is None or not all(sample.ready for sample in samples):
        return []
    samples[0].arm()
    control.phase = WHOLE if head is None else REST
    control.inside, control.members, parted = True, len(samples), False
    try:
        with target.serving(group) as recorded, denoiser.executor.backend():
            if not recorded:
                return []
            output = forward(**gather(places))
            action = control.actions[0]
            if action == PENDING or (action == REUSE and target.unanswered()):
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
        control.inside, control.active, control.members = False, False, 0
    if parted:
        kinds = [[s for s in samples if s.actions == [action]] for action in (COMPUTE, REUSE)]
        return [part for alike in kinds for part in _in_calls(denoiser, alike, gather, group)]
    for sample in samples:
        sample.arm()
        sample.state.uncached_step = False
        denoiser.committer.commit(sample.state, sample.step)
    return [(places, output)]
