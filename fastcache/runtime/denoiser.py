"""One model under a cache: recognises runs and steps, asks the policies, drives the targets."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import sync
from ..models.adapter import BlockAdapter
from ..models.registry import keeps
from ..ops import dispatch
from ..policies import COMPUTE, REUSE, Decision, Step
from ..policies.magnitude import Calibrate
from ..predictors import Guided
from ..recipe import Recipe, Rule
from ..storage.allocate import FP8, NoRoom, device_of
from ..storage.budget import Budget
from ..storage.history import stage
from ..storage.pool import Slots, follow
from ..storage.ring import tail
from ..storage.state import State
from ..targets.bind import NothingToHook, bind
from ..targets.control import AFTER_FIRST_BLOCK, HEAD, PENDING, WHOLE, Control
from ..targets.guidance import GuidanceTarget
from ..targets.modules import ModulesTarget
from ..targets.stack.probe import first_change
from ..targets.stack.target import StackTarget
from .ahead import Prepared
from .branches import Branches
from .compiling import attached, eagerly, watch_compiling
from .context import IMPLICIT, IMPLICIT_BRANCHES, Context, innermost
from .patch import Shell
from .runs import ALL
from .signature import call_signature
from .stats import Record
from .steps import Clock


class Denoiser:
    """One model with the rules bound to it."""

    def __init__(
        self, cache: Any, name: str, model: nn.Module, recipe: Recipe, adapter: BlockAdapter
    ) -> None:
        self.cache, self.name, self.model, self.recipe = cache, name, model, recipe
        self.control = Control(len(recipe.rules))
        self.lock = cache.lock
        self.shell = Shell(self)
        self.original = self.shell.original
        self.clock = Clock(type(model).forward, cache.evented)
        self.branches = Branches()
        self.inside = False  # the model's forward is running
        self.cuts: tuple = ()  # how stacks were cut by the last recording call
        self.owns_graphs = False  # fastcache.compile drives this model
        self.untraceable = False  # torch.compile(model) has given up on the forward
        self.prepared: Prepared | None = None
        self.decisions: list[Decision] = []
        self.targets = self._bind(adapter)
        self.slots = Slots(
            [rule.what.depth for rule in self.recipe.rules],
            functools.partial(cache._run_ended, self),
        )
        self.guidance = next((t for t in self.targets if isinstance(t, GuidanceTarget)), None)
        for i, (rule, target) in enumerate(zip(self.recipe.rules, self.targets, strict=True)):
            if isinstance(target, StackTarget):
                target.judge = functools.partial(self._judge, i, rule, target)
                target.signal = rule.when.measures if rule.when.needs_signal else ""
                target.measure = isinstance(rule.when, Calibrate)
            elif self.guidance is not None and target is not self.guidance:
                target.conditional_half = getattr(rule.when, "conditional_only", False)

    def _bind(self, adapter: BlockAdapter) -> list[Any]:
        """One target per rule. A documented default that fits nothing is left out, with a warning, where
        another rule of the same config fits; alone, or named by the user, it is an error."""
        taken: set[int] = set()
        bound: list[tuple[Rule, Any]] = []
        missing: list[NothingToHook] = []
        for rule in self.recipe.rules:
            start = int(rule.when.needs_signal or getattr(rule.what, "guide", "") == "residual")
            try:
                target = bind(
                    self.model,
                    rule.where,
                    len(bound),
                    rule.what,
                    start,
                    adapter,
                    self.control,
                    taken,
                    self._cache_dtype(rule),
                )
                bound.append((rule, target))
            except NothingToHook as error:
                if not getattr(rule.where, "fallback", None):
                    raise
                missing.append(error)
        if missing and all(isinstance(target, GuidanceTarget) for _, target in bound):
            raise missing[0]
        for nothing in missing:
            warnings.warn(f"fastcache: {nothing}", stacklevel=6)
        self.recipe = Recipe.of([rule for rule, _ in bound], self.recipe.name)
        self.decides_inside = self.recipe.needs_signal  # asked for in every context
        self.control.actions = [COMPUTE] * len(bound)
        return [target for _, target in bound]

    def _cache_dtype(self, rule: Rule) -> torch.dtype | None:
        """What a rule's cached values are kept in. Raises ValueError where it cannot be had."""
        dtype = self.cache.cache_dtype
        refused = None
        if dtype is None:
            return None
        if rule.what.table:
            refused = (
                "TaylorSeerCacheConfig keeps its factors in taylor_factors_dtype; set that instead"
            )
        elif isinstance(rule.when, Calibrate):
            refused = "a calibration measures residuals as they are; leave it out"
        elif dtype == FP8 and isinstance(rule.what, Guided):
            refused = (
                "Guided weighs values on the device, which float8 rows cannot be yet; take bfloat16"
            )
        if refused:
            raise ValueError(f"cache_dtype: {refused}")
        return dtype

    def install(self) -> None:
        """Hook the model. What was done is undone by `remove`, also after a failure half way."""
        self.shell.put_on()
        for target in self.targets:
            target.install()
        attached.add(self)
        dispatch.watchers.add(self)

    def remove(self) -> None:
        attached.discard(self)
        dispatch.watchers.discard(self)
        for state in self.slots.states.values():
            self.cache._run_ended(self, state)
        for target in reversed(self.targets):
            target.remove()
        self.shell.take_off()
        self.slots.clear()
        self.control.state = None

    # --- one call -----------------------------------------------------------------------------------------

    def call(self, args: tuple, kwargs: dict, run: Callable | None = None) -> Any:
        """The model's forward with the cache in charge. `run` stands in for it in compiled calls."""
        with self.lock:
            if self.inside:  # the model calls itself inside its own forward
                return self.original(*args, **kwargs)
            if keeps(kwargs):  # it fills a cache of its own, and is no step
                self._withdraw()
                return self.original(*args, **kwargs)
            call = innermost(self.cache)
            if call is None:
                watch_compiling()
                call = self._branch(args, kwargs)
            try:
                if self.guidance is not None:
                    states = self.slots.states.values()
                    began = {s.key[1] for s in states if s.index and s.key[0] == call.request}
                    self.guidance.refuse({call.name, *began})
                state, step = self._arm(call, args, kwargs)
                self.inside = True
                try:
                    if self.cache.budget is not None:
                        self._look_for_room(self.cache.budget, state)
                    if not (state.blocked or state.bare):
                        output = self._cached(state, args, kwargs, run)
                except NoRoom as error:
                    self._give_up(state, error)
                if state.blocked or state.bare:
                    self._decide_bare(state, step)
                    with eagerly(True):
                        output = self.original(*args, **kwargs)
            except BaseException:
                for denoiser in self.cache.denoisers:
                    denoiser.abandon(call.request)
                raise
            finally:
                self.inside = self.control.armed = False
            self._commit(state, step)
            return output

    def _cached(self, state: State, args: tuple, kwargs: dict, run: Callable | None) -> Any:
        """The model's forward with the targets in charge."""
        self.control.armed = True
        recorded = True
        for target in self.targets:
            target.begin()
            recorded = recorded and target.recorded(state)
        forward = run if run is not None and recorded else self.original
        if recorded and self.guidance is None and self.cache.backend == dispatch.AUTO:
            output = forward(*args, **kwargs)
        else:
            with self.cache._backend(), eagerly(not recorded):
                output = self._forward(forward, args, kwargs)
                for target in () if recorded else self.targets:
                    target.finish()  # which may store what it has seen
        if recorded:
            return output
        for target in self.targets:
            if isinstance(target, ModulesTarget):
                output = target.kept_apart(output)
        self.cuts = tuple(t.cut for t in self.targets if isinstance(t, StackTarget))
        return output

    def _forward(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self.guidance is None:
            return forward(*args, **kwargs)
        return self.guidance.around(forward, args, kwargs)

    def fell_back(self, op: str, why: str) -> None:
        """Count that the reference ran in place of a kernel on a large tensor, if in a call of this model."""
        if not self.lock.acquire(blocking=False):
            return  # another thread is in a call, so the op is not this model's
        try:
            if self.inside:
                self.cache.stats.fallbacks[op] += 1
                self.cache._tell(
                    f"fallback {op}",
                    f"{op} runs on the reference, in several passes over memory: {why}",
                )
        finally:
            self.lock.release()

    # --- calls without storage ----------------------------------------------------------------------------

    def _look_for_room(self, budget: Budget, state: State) -> None:
        """Note whether the cache's budget leaves nothing for this step."""
        group = self.cache.process_group
        state.bare = budget.refuses(self.slots, state, group, self._device(state))

    def _give_up(self, state: State, error: NoRoom) -> None:
        """Out of memory for storage: the rest of the run goes without; the step is computed anew."""
        if self.cache.process_group is not None:  # the other ranks would go on reusing
            raise error
        self.slots.drop(state)
        state.blocked, self.control.armed = True, False
        self.cache._warn_once(
            "fastcache: out of memory for a cache; runs that find none are computed without"
        )

    def _decide_bare(self, state: State, step: Step) -> None:
        """Turn the decisions of a step that has no storage into computing."""
        state.bare = True
        for i, (rule, target) in enumerate(zip(self.recipe.rules, self.targets, strict=True)):
            state.timelines[i].clear()
            if self.decisions[i].action == PENDING:
                self.judged(i, rule, target, None)
            elif self.decisions[i].action == REUSE:
                rule.when.computed(state.runs[i], step)
            self.control.actions[i] = COMPUTE
            self.decisions[i] = self.decisions[i]._replace(
                action=COMPUTE, reason="no room for a cache"
            )

    def _branch(self, args: tuple, kwargs: dict) -> Context:
        """The call that no context describes: the first branch of guidance, or another one."""
        timestep = self.clock.argument(args, kwargs)
        named = {k: v for k, v in kwargs.items() if k != self.clock.name}
        latents = named.pop("hidden_states", args[0] if args else None)
        rest = [v for v in (*args, *named.values()) if v is not latents and v is not timestep]
        number = self.branches.of(latents, timestep, rest)
        if not number:
            return IMPLICIT
        if self.guidance is not None:
            raise ValueError(
                "target: the same latents came twice at one timestep, so guidance runs sequentially, and "
                "FasterCache's guidance half needs both halves in one batch; open cache.context('cond') "
                "and cache.context('uncond') around the calls, or set is_guidance_distilled=True"
            )
        return IMPLICIT_BRANCHES[number]

    # --- calls inside the user's own torch.compile -------------------------------------------------------

    def traced(self, args: tuple, kwargs: dict) -> Any:
        """The model's forward inside a graph: a context outside it has prepared everything."""
        control = self.control
        if self.recipe.needs_signal:
            raise RuntimeError(
                "fastcache: FirstBlockCache decides inside the forward, which torch.compile(model) cannot "
                "trace; use fastcache.compile(model)"
            )
        if not control.armed:
            raise RuntimeError(
                "fastcache: a compiled model was called without a context of its own, so no step was decided; "
                "open `with cache.context(name):` around each call, one at a time in a thread, or use "
                "fastcache.compile(model)"
            )
        control.seen = self.clock.argument(args, kwargs)
        if keeps(kwargs) or call_signature(args, kwargs) != control.state.signature:
            control.armed = False  # the routing is off: this call runs uncached
            output = self.original(*args, **kwargs)
            control.missed = True
            return output
        output = self._forward(self.original, args, kwargs)
        control.armed = False
        return output

    def expect_graphs(self) -> None:
        """Some of the model may be compiled from now on: storage that exists is marked as staying in place."""
        if not self.control.compiled:
            self.control.compiled = self.slots.fixed = True
            for state in (*self.slots.states.values(), *self.slots.spares):
                state.make_static()

    def untraced(self, args: tuple, kwargs: dict) -> Any:
        """The model's forward where torch.compile(model) could not trace it: all of it runs uncompiled."""
        self.untraceable = self.recipe.needs_signal  # further contexts do not try again
        self.cache._warn_once(
            f"fastcache: {self.name} runs uncompiled inside torch.compile(model), because "
            + (
                "FirstBlockCache decides inside the forward"
                if self.untraceable
                else "no context is open around the call"
            )
            + "; use fastcache.compile(model)"
        )
        return self.call(args, kwargs)

    def expect(self, frame: Context) -> bool:
        """Get ready for a call that may run inside a graph; False where it must run eagerly.

        Where nothing was ever traced there is nothing to do: `graph_begins` says when that changes.
        """
        if self.owns_graphs or self.decides_inside:
            return self.owns_graphs or not self.untraceable
        compiled = self.control.compiled
        if compiled:
            frame.lock()
        state = self.slots.states.get((frame.request, frame.name))
        if state is None or state.bare or state.away or not self._recorded(state):
            self._withdraw()
            return False
        if compiled:  # the step is decided here, before the call
            self._prepare(frame, state)
        return True

    def graph_begins(self) -> None:
        """Called when torch.compile is about to trace something, perhaps this model."""
        if self.inside:
            if not self.control.compiled:
                self.expect_graphs()
                self._stage(self.control.state)
                for target in self.targets:
                    if isinstance(target, ModulesTarget):
                        target.begin()
        elif self.prepared is None and not self.control.compiled:
            frame = innermost(self.cache)
            # no waiting: torch holds a lock of its own here
            if frame is not None and frame.lock(0):
                self.expect_graphs()
                self.expect(frame)

    def _prepare(self, frame: Context, state: State) -> None:
        """Decide the step before its call. Two open contexts of one thread, none inside the other, could
        each be meant by a compiled call: then neither is armed, and the call says so."""
        crossed = self.prepared is not None and not frame.within(self.prepared.frame)
        self._withdraw()
        if crossed:
            return
        timestep = self.clock.told(frame, self.cache.timestep_callback)
        index = self._index(state, frame, timestep)
        before = [run.copy() for run in state.runs]  # none where a run begins
        step = self._decide_all(state, frame, index, timestep)
        if state.blocked:
            return
        for target in self.targets:
            target.begin()
        self.prepared = Prepared(state, step, before, frame)
        self.control.armed, self.control.missed, self.control.seen = True, False, None

    def _withdraw(self) -> None:
        """Take back decisions that were prepared for a graph and not used."""
        prepared, self.prepared = self.prepared, None
        if prepared is not None:
            self.control.armed = False
            prepared.state.runs = prepared.runs

    def _recorded(self, state: State) -> bool:
        """Whether all storage exists, so that a call may run inside a graph."""
        for target in self.targets:
            if not target.recorded(state):
                return False
        return True

    def settle(self, prepared: Prepared, failed: bool) -> None:
        """Account for what happened inside a context that a call was prepared for."""
        if failed or self.control.armed:  # or it held no call
            self._withdraw()
            return
        (state, step, _, _), self.prepared = prepared, None
        if self.control.missed:  # another shape: the next call allocates
            self.slots.forget(state.key)
        else:
            self._commit(state, step)
            self._check_clock(state, step)

    def _check_clock(self, state: State, step: Step) -> None:
        """Notice a new run that began inside a graph, where no timestep could be looked at beforehand."""
        clock = (
            None if step.timestep is not None else self.clock.number(self.control.seen, state.total)
        )
        before, state.timestep = state.timestep, clock if clock is not None else state.timestep
        if clock is None or before is None or not step.index:
            return
        if self.clock.backwards(before, clock):
            reused = any(d.action == REUSE for d in self.decisions)
            self.abandon(state.key[0])
            if not reused:
                return
            raise RuntimeError(
                f"fastcache: a new run began in context {state.key[1]!r} inside a compiled model, unseen from "
                "outside, and its first step has reused the old one's; call cache.reset() between runs, "
                "or give cache.context(step_index=...) or num_inference_steps"
            )

    def _arm(self, call: Context, args: tuple, kwargs: dict) -> tuple[State, Step]:
        """Find the state, notice whether a run begins, and decide what can be decided beforehand."""
        if torch.is_grad_enabled() and self.model.training:
            self._refuse_training()
        key = (call.request, call.name)
        state = self.slots.states.get(key) or self.slots.add(key)
        shape, prepared, clock = call_signature(args, kwargs), self.prepared, self.clock
        if prepared is not None and prepared.state is state:
            told = prepared.step.timestep
        else:  # not prepared, or what was prepared is another context's
            told = clock.told(call, self.cache.timestep_callback)
        now = told if told is not None else clock.read(state, call, args, kwargs)
        if prepared is not None:
            step = self._prepared_step(state, call, shape, now)
            if step is not None:
                return state, step
            self._withdraw()
        if state.signature != shape:
            self.slots.adopt(state, shape)
        if self.slots.streams:
            follow(state)
        index = self._index(state, call, now)
        return state, self._decide_all(state, call, index, now)

    def _prepared_step(
        self, state: State, call: Context, shape: tuple, clock: float | None
    ) -> Step | None:
        """The step that a context prepared for a graph, where a call that runs eagerly would be decided alike."""
        if self.prepared is None or self.prepared.state is not state or state.signature != shape:
            return None
        step = self.prepared.step
        if clock != step.timestep:  # the model's own argument tells the time
            if any(r.when.needs_timestep for r in self.recipe.rules):
                return None
            if self.clock.run_is_over(state, call, clock):
                return None
            state.timestep = state.step_timestep = clock
            step = step._replace(timestep=clock)
        self.prepared = None
        return step

    def _decide_all(self, state: State, call: Context, index: int, timestep: float | None) -> Step:
        """Decide for every rule, and hand the decisions to `control`."""
        if not state.runs:
            state.total = call.num_inference_steps or self._planned_total()
            self._agree_on_plan(state, index)
            state.runs = [rule.when.begin(state.total) for rule in self.recipe.rules]
        elif call.num_inference_steps is not None:
            state.total = call.num_inference_steps
        state.armed_step, state.step_timestep = index, timestep
        if timestep is not None:
            state.timestep = timestep
        control = self.control
        control.state, control.batch, control.phase = state, "full", WHOLE
        step = Step(index, state.total, timestep, call.sigma)
        self.decisions = []
        for i, rule in enumerate(self.recipe.rules):
            if rule.when.needs_signal:
                decision = AFTER_FIRST_BLOCK
            else:
                decision = rule.when.decide(state.runs[i], step)
                if decision.action == REUSE:
                    decision = self._confirmed(i, rule, state, step, decision)
            self.decisions.append(decision)
            control.actions[i] = decision.action
            if self.targets[i] is self.guidance and decision.action == REUSE:
                step = step._replace(guidance_skipped=True)
                control.batch = "half"
        if control.compiled:
            self._stage(state)
        return step

    def _stage(self, state: State) -> None:
        """Give compiled code what it has to know of this step, also of one that is still to be decided."""
        try:
            for i, rule in enumerate(self.recipe.rules):
                if rule.what.depth > 1 or rule.what.table:
                    timeline, action = state.timelines[i], self.control.actions[i]
                    weights: tuple[float, ...] = ()
                    if getattr(self.targets[i], "guide", None) is not None:
                        pass  # it finds its weights on the device
                    elif action == REUSE:
                        weights = self.targets[i].weights
                    elif action == PENDING and timeline.steps:
                        weights = rule.what.weights(timeline.steps, state.armed_step)
                    stage(timeline, weights, state.armed_step, self._device(state))
        except NoRoom as error:
            self._give_up(state, error)

    def _agree_on_plan(self, state: State, index: int) -> None:
        """Where ranks share samples: raise on all of them if they are about to run different plans."""
        group = self.cache.process_group
        if group is None:
            return
        budget = self.cache.budget
        limit = None if budget is None else budget.limit
        digest = self.recipe.digest(state.total, index, state.key[1], limit)
        if not sync.unanimous(digest, group, self._device(state)):
            raise RuntimeError(
                "fastcache: config: the ranks of process_group begin different runs, and would part; here it is "
                f"{self.recipe.rules} with num_inference_steps={state.total}, context {state.key[1]!r}, step "
                f"{index}. Give every rank the same config, steps, contexts and max_bytes"
            )

    def _device(self, state: State) -> torch.device:
        return device_of(state.signature or ())

    def _confirmed(
        self, i: int, rule: Rule, state: State, step: Step, decision: Decision
    ) -> Decision:
        """A wish to reuse, granted where there is something valid to reuse."""
        target = self.targets[i]
        if not target.ready(state):
            rule.when.computed(state.runs[i], step)
            return decision._replace(action=COMPUTE, reason="nothing valid to reuse")
        guide = getattr(target, "guide", None)
        if guide is not None and self._misfitting(i, rule, state):
            rule.when.computed(state.runs[i], step)
            return decision._replace(action=COMPUTE, reason="misfit of the last step")
        if (
            rule.what.depth
            and not getattr(target, "per_module", False)
            and target is not self.guidance
        ):
            target.weights = rule.what.weights(state.timelines[i].steps, step.index)
            if guide is not None:
                guide.stage(state, target.weights)
        return decision

    def _misfitting(self, i: int, rule: Rule, state: State) -> bool:
        """Whether the step before was reused and its guide explained too badly; reads one number then."""
        bound = getattr(rule.what, "max_misfit", None)
        if bound is None or state.runs[i].in_a_row < 2:
            return False
        return not sync.mean(state.head["misfit"], self.cache.process_group) <= bound

    def _judge(self, i: int, rule: Rule, target: StackTarget, hidden: Tensor, x: Tensor) -> None:
        """The decision of a rule that looks at the first block, taken inside the model's forward."""
        state, control = self.control.state, self.control
        if not rule.when.needs_signal:
            return
        if rule.when.measures == "misfit":
            measured = self._measure_misfit(i, rule, target, hidden, x)
        else:
            measured = first_change(state, hidden, x, getattr(rule.when, "per_sample", False))
            if control.phase == HEAD and measured is not None:
                tail(state.head["sums"], measured).copy_(measured)
        if control.phase != HEAD:
            self.judged(i, rule, target, measured)

    def _measure_misfit(
        self, i: int, rule: Rule, target: StackTarget, hidden: Tensor, x: Tensor
    ) -> Tensor | None:
        """How well this step's guide follows from its history, on the device; None without a history."""
        state: State = self.control.state
        if self.control.phase != HEAD:
            if not target.ready(state):
                return None
            self.stage_prior(i)
        assert target.guide is not None
        target.guide.see(state, i, REUSE, target.guide.of(hidden, x))
        return state.head["misfit"]

    def stage_prior(self, i: int) -> None:
        """Give a guide the weights that its ridge pulls toward, and compiled code the order of its rows."""
        state: State = self.control.state
        prior = self.recipe.rules[i].what.weights(state.timelines[i].steps, state.armed_step)
        self.targets[i].guide.stage(state, prior)

    def judged(self, i: int, rule: Rule, target: StackTarget, measured: Tensor | None) -> None:
        """Decide with what was measured; the one device read of a step."""
        state, control = self.control.state, self.control
        group = self.cache.process_group
        change = None
        if group is not None and (measured is None or not target.ready(state)):
            # the other ranks wait for a number: join them with none, so that all compute
            held = state.head.get("residual")  # without one, no rank has one
            shape = (1,) if held is None else rule.when.sums(held)
            sync.agreed(torch.full(shape, math.nan, device=self._device(state)), group)
        elif measured is not None and rule.when.measures == "misfit":
            change = sync.mean(measured, group)
        elif measured is not None:
            change = sync.relative_change(measured, group)
        step = Step(state.armed_step, state.total, state.step_timestep)
        decision = rule.when.decide(state.runs[i], step, change)
        if decision.action == REUSE:
            decision = self._confirmed(i, rule, state, step, decision)
        self.decisions[i] = decision
        control.actions[i] = decision.action

    def _commit(self, state: State, step: Step) -> None:
        """Account for a step that went well."""
        for i, rule in enumerate(() if state.bare else self.recipe.rules):
            computed = self.decisions[i].action == COMPUTE
            if computed or rule.what.feeds_back:
                timeline = state.timelines[i]
                for unit in state.units[i].values():
                    if unit.touched:
                        unit.stored(timeline.pushes, self.control.compiled)
                timeline.push(step.index)
            target = self.targets[i]
            if isinstance(target, GuidanceTarget):
                target.commit(state, self.decisions[i].action)
            elif isinstance(target, StackTarget) and computed:
                half = self.control.batch == "half"
                state.halved = rule.what.depth if half else max(state.halved - 1, 0)
            if computed and getattr(target, "signal", "") == "change":
                state.head["kept"] = True
        state.index = step.index + 1
        decision = self.decisions[0]
        if len(self.decisions) > 1:
            decision = next((d for d in self.decisions if d.action == REUSE), decision)
        if decision.reason == "past the calibrated steps":
            self.cache._warn_once(
                f"fastcache: steps past the {step.total} of num_inference_steps have no ratio and are "
                "computed. Give the run's length with cache.context(num_inference_steps=...)"
            )
        late = None
        if decision.action == REUSE and decision.signal is None:
            target = self.targets[self.decisions.index(decision)]
            if getattr(target, "guide", None) is not None:
                late = state.head["misfit"].clone()
            elif "seen" in state.head:  # the device has decided
                late = state.head["seen"].clone()
        record = Record(
            state.key[0],
            state.key[1],
            step.index,
            decision.action,
            decision.signal if late is None else late,
            decision.threshold,
            decision.reason,
            step.timestep,
            tuple(self.control.actions),
            self.name,
        )
        state.records.append(record)
        self.cache.stats.add(record)
        self.slots.retire(state)
        if self.cache.budget is not None:
            self.cache.budget.keep(self.slots, state, self.name)
        if self.cache._unsaid:
            self.cache._speak()

    # --- runs ---------------------------------------------------------------------------------------------

    def _index(self, state: State, call: Context, clock: float | None) -> int:
        """The index of this step; restarts the state where a new run begins."""
        index, anew = self.clock.index(state, call, clock)
        if anew:
            self.cache._run_ended(self, state)
            state.restart()
        return index

    def _planned_total(self) -> int | None:
        return next(
            (n for r in self.recipe.rules if (n := getattr(r.when, "num_inference_steps", None))),
            None,
        )

    def _refuse_training(self) -> None:
        if any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "target: the model is in training mode with gradients on; a cached step has no gradient. "
                "Call model.eval(), run under torch.no_grad(), or cache.disable() first"
            )

    def abandon(self, request: Any) -> None:
        """Forget all contexts of a request: an exception passed through one of its calls."""
        with self.lock:
            for key, state in self.slots.states.items():
                if key[0] == request:
                    state.restart()

    def reset(self, request: Any = ALL) -> None:
        """Forget the runs of one request, or all; their storage serves the next ones."""
        with self.lock:
            for key in [k for k in self.slots.states if request is ALL or k[0] == request]:
                self.slots.forget(key)
            if request is ALL:
                self.clock.clear()
                self.branches.clear()
