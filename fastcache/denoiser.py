"""One model under a cache: recognises runs and steps, asks the policies, drives the targets."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from . import signal
from .adapters import BlockAdapter, parameter_names
from .branches import Branches
from .context import IMPLICIT, IMPLICIT_BRANCHES, Call, call_signature
from .policies import COMPUTE, REUSE, Decision, Step
from .policies.magnitude import Calibrate
from .recipe import Recipe, Rule
from .state import State, Timeline, stage
from .stats import Record
from .targets.bind import NothingToHook, bind
from .targets.guidance import GuidanceTarget
from .targets.stack import HEAD, WHOLE, StackTarget, first_residual, keep_residual

if TYPE_CHECKING:
    from .runtime import Cache


PENDING = "pending"  # the action of a rule that decides after the first block has run
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time")
MARK = "_fastcache"
RISES = 3  # runs of a single step in a row, each at a later timestep: time runs the other way
POOL = 8  # storages of finished requests kept for the next ones
_UNSET = object()


def eagerly(wanted: bool) -> contextlib.AbstractContextManager:
    """Run whatever the user has compiled uncompiled: calls that allocate storage are not for graphs."""
    if wanted and "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


class Control:
    """The only object that traced code reads: whether a call is armed, its state and the actions.

    armed: a call is prepared and its step not yet taken. missed: traced code met a shape it has no storage
    for. compiled: some of the model may be compiled, so actions hold for all modules of a rule alike.
    """

    __slots__ = ("actions", "armed", "batch", "compiled", "missed", "phase", "seen", "state")

    def __init__(self, rules: int) -> None:
        self.armed = self.missed = self.compiled = False
        self.phase = WHOLE
        self.seen: Any = None  # the timestep that the model was called with, inside a graph
        self.state: Any = None  # the State of the running call
        self.actions: list[str] = [COMPUTE] * rules
        self.batch = "full"  # "half" while the unconditional half is skipped


class Denoiser:
    """One model with the rules bound to it."""

    def __init__(
        self, cache: Cache, name: str, model: nn.Module, recipe: Recipe, adapter: BlockAdapter
    ) -> None:
        self.cache, self.name, self.model, self.recipe = cache, name, model, recipe
        self.control = Control(len(recipe.rules))
        self.states: dict[tuple[Any, str], State] = {}
        self.pool: list[State] = []
        self.lock = threading.RLock()
        # a hook of accelerate keeps the forward below it there: under it, ours survives its removal
        self.place = "_old_forward" if "_old_forward" in model.__dict__ else "forward"
        self.original: Callable[..., Any] = getattr(model, self.place)
        names = parameter_names(type(model).forward)
        self.timestep_name = next((n for n in TIMESTEP_NAMES if n in names), None)
        self.timestep_at = names.index(self.timestep_name) if self.timestep_name else -1
        self.ascending = False  # the model's timesteps grow during a run
        self.rises: dict[
            Any, int
        ] = {}  # per state: runs of one step, each later than the one before
        self.branches = Branches()
        self.inside = False  # the model's forward is running
        self.owns_graphs = False  # fastcache.compile drives this model
        self.untraceable = False  # torch.compile(model) has given up on the forward
        self.prepared: tuple[State, Step, list] | None = None
        self.decisions: list[Decision] = []
        self._saved: list[tuple[str, Any]] = []
        self.targets = self._bind(adapter)
        self.guidance = next((t for t in self.targets if isinstance(t, GuidanceTarget)), None)
        for i, (rule, target) in enumerate(zip(self.recipe.rules, self.targets, strict=True)):
            if isinstance(target, StackTarget):
                target.judge = functools.partial(self._judge, i, rule, target)
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
        self.control.actions = [COMPUTE] * len(bound)
        return [target for _, target in bound]

    # --- installing ---------------------------------------------------------------------------------------

    def install(self) -> None:
        """Hook the model. What was done is undone by `remove`, also after a failure half way."""
        model = self.model
        self.shell = self._shell()
        self._put(MARK, self)
        self._put(self.place, self.shell)
        if callable(getattr(type(model), "enable_cache", None)):
            self._put("enable_cache", _enabled_already)
        if callable(getattr(type(model), "cache_context", None)):
            self._put("cache_context", self._cache_context(model.cache_context))
        if callable(getattr(type(model), "_reset_stateful_cache", None)):
            self._put("_reset_stateful_cache", self._reset_event(model._reset_stateful_cache))
        for target in self.targets:
            target.install()

    def remove(self) -> None:
        for state in self.states.values():
            self.cache._run_ended(self, state)
        for target in reversed(self.targets):
            target.remove()
        attributes = self.model.__dict__
        while self._saved:
            name, before = self._saved.pop()
            if name == self.place and attributes.get(name) is not self.shell:
                self.unshell()
            elif before is _UNSET:
                attributes.pop(name, None)
            else:
                attributes[name] = before
        self.states.clear()
        self.pool.clear()
        self.control.state = None

    def unshell(self) -> None:
        """Put the model's forward back where a hook added or removed since has moved ours."""
        attributes = self.model.__dict__
        for name in ("forward", "_old_forward"):
            if attributes.get(name) is self.shell:
                attributes[name] = self.original
                if name == "forward" and getattr(self.original, "__self__", None) is self.model:
                    del attributes[name]

    def _put(self, name: str, value: Any) -> None:
        self._saved.append((name, self.model.__dict__.get(name, _UNSET)))
        self.model.__dict__[name] = value

    def _shell(self) -> Callable[..., Any]:
        original = self.original

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.model.__dict__.get(MARK) is not self:  # disabled, but a hook still calls us
                return original(*args, **kwargs)
            if torch.compiler.is_compiling():
                return self.traced(args, kwargs)
            if get_eval_frame_callback() in (None, False):
                return self.call(args, kwargs)
            # torch.compile gave up on this frame: it would go on to compile our host code and the model's
            # frames one by one, so what follows runs as it is
            return torch._dynamo.run(self._untraced)(args, kwargs)

        return forward

    def _cache_context(self, original: Any) -> Callable:
        """The model's own cache_context, which also opens ours: pipelines drive the cache through it."""

        @functools.wraps(original)
        @contextlib.contextmanager
        def cache_context(name: str, **fields: Any) -> Iterator[None]:
            known = {
                k: fields[k]
                for k in ("step_index", "num_inference_steps", "timestep", "sigma")
                if k in fields
            }
            with (
                self.cache.context(name, request=self.cache._request(), **known),
                original(name, **fields),
            ):
                yield

        return cache_context

    def _reset_event(self, original: Any) -> Callable:
        """The model's own reset, which pipelines call at the end of a run."""

        @functools.wraps(original)
        def reset(*args: Any, **kwargs: Any) -> Any:
            self.reset(self.cache._request())
            result = original(*args, **kwargs)
            self.cache._speak()
            return result

        return reset

    # --- one call -----------------------------------------------------------------------------------------

    def call(self, args: tuple, kwargs: dict, run: Callable | None = None) -> Any:
        """The model's forward with the cache in charge. `run` stands in for it in compiled calls."""
        with self.lock:
            if self.inside:  # the model calls itself inside its own forward
                return self.original(*args, **kwargs)
            call = self.cache._call()
            if call is IMPLICIT:
                call = self._branch(args, kwargs)
            try:
                if self.guidance is not None:
                    states = self.states.values()
                    began = {s.key[1] for s in states if s.index and s.key[0] == call.request}
                    self.guidance.refuse({call.name, *began})
                state, step = self._arm(call, args, kwargs)
                self.inside = self.control.armed = True
                for target in self.targets:
                    target.begin()
                recording = not self._recorded(state)
                with self.cache._backend(), eagerly(recording and self.control.compiled):
                    forward = self.original if run is None or recording else run
                    if self.guidance is not None:
                        output = self.guidance.around(forward, args, kwargs)
                    else:
                        output = forward(*args, **kwargs)
                    for target in self.targets:
                        target.finish()
            except BaseException:
                for denoiser in self.cache.denoisers:
                    denoiser.abandon(call.request)
                raise
            finally:
                self.inside = self.control.armed = False
            self._commit(state, step)
            return output

    def _branch(self, args: tuple, kwargs: dict) -> Call:
        """The call that no context describes: the first branch of guidance, or another one."""
        timestep = self._timestep_argument(args, kwargs)
        named = {k: v for k, v in kwargs.items() if k != self.timestep_name}
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
                "fastcache: a compiled model was called without a context, so no step was decided; open "
                "`with cache.context(name):` around the call, or use fastcache.compile(model)"
            )
        control.seen = self._timestep_argument(args, kwargs)
        if call_signature(args, kwargs) != control.state.signature:
            control.armed = False  # the routing is off: this call runs uncached
            output = self.original(*args, **kwargs)
            control.missed = True
            return output
        if self.guidance is not None:
            output = self.guidance.around(self.original, args, kwargs)
        else:
            output = self.original(*args, **kwargs)
        control.armed = False
        return output

    def expect_graphs(self) -> None:
        """Some of the model may be compiled from now on: storage that exists is marked as staying in place."""
        if not self.control.compiled:
            self.control.compiled = True
            for state in (*self.states.values(), *self.pool):
                state.make_static()

    def _untraced(self, args: tuple, kwargs: dict) -> Any:
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

    def prepare(self, call: Call) -> bool:
        """Arm a call that may run inside a graph; False where it must run eagerly to allocate storage."""
        self._withdraw()
        self.expect_graphs()
        state = self.states.get((call.request, call.name))
        if (
            state is None
            or not self._recorded(state)
            or self.recipe.needs_signal
            or self.owns_graphs
        ):
            return self.owns_graphs or (self.recipe.needs_signal and not self.untraceable)
        timestep = self._rule_timestep(call)
        index = self._index(state, call, timestep)
        before = [run.copy() for run in state.runs]  # none where a run begins
        step = self._decide_all(state, call, index, timestep, timestep)
        for target in self.targets:
            target.begin()
        self.prepared = (state, step, before)
        self.control.armed, self.control.missed, self.control.seen = True, False, None
        return True

    def _withdraw(self) -> None:
        """Take back decisions that were prepared for a graph and not used."""
        prepared, self.prepared = self.prepared, None
        if prepared is not None:
            state, _, runs = prepared
            state.runs = runs

    def _recorded(self, state: State) -> bool:
        """Whether all storage exists, so that a call may run inside a graph."""
        return all(target.recorded(state) for target in self.targets)

    def settle(self, failed: bool) -> None:
        """Account for what happened inside the context that `prepare` was called for."""
        prepared, self.prepared = self.prepared, None
        if prepared is None or failed:
            self.control.armed = False
            return
        state, step, before = prepared
        if self.control.armed:  # the context held no call
            self.control.armed = False
            state.runs = before
        elif self.control.missed:  # another shape: the next call allocates
            self._release(state)
            del self.states[state.key]
        else:
            self._commit(state, step)
            self._check_clock(state, step)

    def _check_clock(self, state: State, step: Step) -> None:
        """Notice a new run that began inside a graph, where no timestep could be looked at beforehand."""
        clock = (
            None if step.timestep is not None else self._readable(self.control.seen, state.total)
        )
        before, state.timestep = state.timestep, clock if clock is not None else state.timestep
        if clock is None or before is None or not step.index:
            return
        if clock < before if self.ascending else clock > before:
            reused = any(d.action == REUSE for d in self.decisions)
            self.abandon(state.key[0])
            if not reused:
                return
            raise RuntimeError(
                f"fastcache: a new run began in context {state.key[1]!r} inside a compiled model, unseen from "
                "outside, and its first step has reused the old one's; call cache.reset() between runs, "
                "or give cache.context(step_index=...) or num_inference_steps"
            )

    def _arm(self, call: Call, args: tuple, kwargs: dict) -> tuple[State, Step]:
        """Find the state, notice whether a run begins, and decide what can be decided beforehand."""
        self._refuse_training()
        key = (call.request, call.name)
        if key not in self.states:
            self.states[key] = self._new_state(key)
        state = self.states[key]
        shape = call_signature(args, kwargs)
        told = self._rule_timestep(call) if self.prepared is None else self.prepared[1].timestep
        clock = told if told is not None else self._clock(state, call, args, kwargs)
        step = self._prepared_step(state, call, shape, clock)
        if step is not None:
            return state, step
        self._withdraw()
        if state.signature != shape:
            self._adopt(state, shape)
        index = self._index(state, call, clock)
        return state, self._decide_all(state, call, index, clock, clock)

    def _prepared_step(
        self, state: State, call: Call, shape: tuple, clock: float | None
    ) -> Step | None:
        """The step that a context prepared for a graph, where a call that runs eagerly would be decided alike."""
        if self.prepared is None or self.prepared[0] is not state or state.signature != shape:
            return None
        step = self.prepared[1]
        if clock != step.timestep:  # the model's own argument tells the time
            if any(r.when.needs_timestep for r in self.recipe.rules):
                return None
            if self._run_is_over(state, call, clock):
                return None
            state.timestep = state.step_timestep = clock
            step = step._replace(timestep=clock)
        self.prepared = None
        return step

    def _decide_all(
        self, state: State, call: Call, index: int, clock: float | None, timestep: float | None
    ) -> Step:
        """Decide for every rule, and hand the decisions to `control`."""
        if not state.runs:
            state.total = call.num_inference_steps or self._planned_total()
            self._agree_on_plan(state, index)
            state.runs = [rule.when.begin(state.total) for rule in self.recipe.rules]
        elif call.num_inference_steps is not None:
            state.total = call.num_inference_steps
        state.armed_step, state.step_timestep = index, timestep
        if clock is not None:
            state.timestep = clock
        control = self.control
        control.state, control.batch, control.phase = state, "full", WHOLE
        step = Step(index, state.total, timestep, call.sigma)
        self.decisions = []
        for i, rule in enumerate(self.recipe.rules):
            decision = self._decide(i, rule, state, step)
            self.decisions.append(decision)
            control.actions[i] = decision.action
            if self.targets[i] is self.guidance and decision.action == REUSE:
                step = step._replace(guidance_skipped=True)
                control.batch = "half"
            if control.compiled and (rule.what.depth > 1 or rule.what.table):
                weights = self.targets[i].weights if decision.action == REUSE else ()
                stage(state.timelines[i], weights, index, self._device(state))
        return step

    def _agree_on_plan(self, state: State, index: int) -> None:
        """Where ranks share samples: raise on all of them if they are about to run different plans."""
        group = self.cache.process_group
        if group is None:
            return
        digest = self.recipe.digest(state.total, index, state.key[1])
        if not signal.unanimous(digest, group, self._device(state)):
            raise RuntimeError(
                "fastcache: config: the ranks of process_group begin different runs, and would part; here it is "
                f"{self.recipe.rules} with num_inference_steps={state.total}, context {state.key[1]!r}, step "
                f"{index}. Give every rank the same config, steps and contexts"
            )

    def _device(self, state: State) -> torch.device:
        return state.signature[0][2] if state.signature else torch.device("cpu")

    def _decide(self, i: int, rule: Rule, state: State, step: Step) -> Decision:
        if rule.when.needs_signal:
            return Decision(PENDING)
        decision = rule.when.decide(state.runs[i], step)
        if decision.action == REUSE:
            return self._confirmed(i, rule, state, step, decision)
        return decision

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
        return not signal.mean(state.head["misfit"], self.cache.process_group) <= bound

    def _judge(self, i: int, rule: Rule, target: StackTarget, hidden: Tensor, x: Tensor) -> None:
        """The decision of a rule that looks at the first block, taken inside the model's forward."""
        state, control = self.control.state, self.control
        if not rule.when.needs_signal:
            return
        if rule.when.measures == "misfit":
            measured = self._measure_misfit(i, rule, target, hidden, x)
        else:
            measured = first_residual(state, hidden, x)
            if control.phase == HEAD:
                state.head["sums"].copy_(measured)
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
            numbers = 1 if rule.when.measures == "misfit" else 2
            signal.agreed(torch.full((numbers,), math.nan, device=self._device(state)), group)
        elif measured is not None and rule.when.measures == "misfit":
            change = signal.mean(measured, group)
        elif measured is not None:
            change = signal.relative_change(measured, group)
        step = Step(state.armed_step, state.total, state.step_timestep)
        decision = rule.when.decide(state.runs[i], step, change)
        if decision.action == REUSE:
            decision = self._confirmed(i, rule, state, step, decision)
        self.decisions[i] = decision
        control.actions[i] = decision.action

    def restage(self, i: int) -> None:
        """Give compiled code the weights of a decision that fell inside the step."""
        state = self.control.state
        if self.control.actions[i] == REUSE:
            device = self._device(state)
            stage(state.timelines[i], self.targets[i].weights, state.armed_step, device)

    def _commit(self, state: State, step: Step) -> None:
        """Account for a step that went well."""
        for i, rule in enumerate(self.recipe.rules):
            computed = self.decisions[i].action == COMPUTE
            if computed or rule.what.feeds_back:
                timeline = state.timelines[i]
                for unit in state.units[i].values():
                    if unit.touched:
                        unit.stored(timeline.pushes)
                timeline.push(step.index)
            target = self.targets[i]
            if isinstance(target, GuidanceTarget):
                target.commit(state, self.decisions[i].action)
            elif isinstance(target, StackTarget) and computed:
                half = self.control.batch == "half"
                state.halved = rule.what.depth if half else max(state.halved - 1, 0)
            if computed and rule.when.needs_signal and rule.when.measures == "change":
                keep_residual(state)
        state.index = step.index + 1
        decision = self._leading(self.decisions)
        if decision.reason == "past the calibrated steps":
            self.cache._warn_once(
                f"fastcache: steps past the {step.total} of num_inference_steps have no ratio and are "
                "computed. Give the run's length with cache.context(num_inference_steps=...)"
            )
        actions = tuple(d.action for d in self.decisions)
        late = None
        if decision.action == REUSE and decision.signal is None:
            target = self.targets[self.decisions.index(decision)]
            if getattr(target, "guide", None) is not None:
                late = state.head["misfit"].clone()
        self.cache.stats.add(
            Record(
                state.key[0],
                state.key[1],
                step.index,
                decision.action,
                decision.signal,
                decision.threshold,
                decision.reason,
                step.timestep,
                actions,
                self.name,
            ),
            late,
        )
        if self.cache._unsaid:
            self.cache._speak()

    @staticmethod
    def _leading(decisions: list[Decision]) -> Decision:
        """The decision that a record shows: the first that reuses, else the first."""
        return next((d for d in decisions if d.action == REUSE), decisions[0])

    # --- runs and steps -----------------------------------------------------------------------------------

    def _new_state(self, key: tuple[Any, str]) -> State:
        state = State(key, len(self.recipe.rules))
        state.timelines = [Timeline(rule.what.depth) for rule in self.recipe.rules]
        return state

    def _adopt(self, state: State, shape: tuple) -> None:
        """Begin a run with storage of this shape, taken from the pool where there is some."""
        if state.signature is not None:
            self.cache._run_ended(self, state)
            self._release(state)
        spare = next((s for s in self.pool if s.signature == shape), None)
        if spare is not None:
            self.pool.remove(spare)
            state.units, state.timelines, state.head = spare.units, spare.timelines, spare.head
        else:
            fresh = self._new_state(state.key)
            state.units, state.timelines, state.head = fresh.units, fresh.timelines, fresh.head
        state.signature = shape
        state.restart()

    def _release(self, state: State) -> None:
        """Give a state's storage to the pool, emptied."""
        if state.signature is None or not any(state.units):
            return
        spare = State(state.key, 0)
        spare.units, spare.timelines, spare.head = state.units, state.timelines, state.head
        spare.signature = state.signature
        spare.restart()
        self.pool.append(spare)
        del self.pool[:-POOL]

    def _index(self, state: State, call: Call, clock: float | None) -> int:
        """The index of this step; restarts the state where a new run begins."""
        started = state.index > 0
        if call.step_index is not None:
            last = state.index - 1
            if started and call.step_index == last and last > 0:
                raise ValueError(
                    f"step_index {last} came twice for request {call.request!r}, context {call.name!r}: a second "
                    "call at the same step is another branch, give it a name of its own, as in "
                    "cache.context('uncond', step_index=...)"
                )
            if started and call.step_index <= last:
                self._begin_anew(state)
            return call.step_index
        if started and self._run_is_over(state, call, clock):
            self._begin_anew(state)
        return state.index

    def _begin_anew(self, state: State) -> None:
        self.cache._run_ended(self, state)
        state.restart()

    def _run_is_over(self, state: State, call: Call, clock: float | None) -> bool:
        total = call.num_inference_steps or state.total
        complete = total is not None and state.index >= total
        if clock is None or state.timestep is None or clock == state.timestep:
            return complete
        turned = clock < state.timestep if self.ascending else clock > state.timestep
        if not turned:
            self.rises.pop(state.key, None)
            return False
        rises = self.rises[state.key] = self.rises.get(state.key, 0) + 1 if state.index == 1 else 0
        if rises >= RISES:
            self.ascending = not self.ascending
            self.rises.clear()
            return False
        return True

    def _clock(self, state: State, call: Call, args: tuple, kwargs: dict) -> float | None:
        """The timestep by which runs are told apart, from the model's own argument.

        One on an accelerator is read (one wait) only where nothing else tells runs apart.
        """
        if call.step_index is not None:
            return None
        total = call.num_inference_steps or state.total
        return self._readable(self._timestep_argument(args, kwargs), total)

    def _timestep_argument(self, args: tuple, kwargs: dict) -> Any:
        if self.timestep_name is None:
            return None
        if self.timestep_name in kwargs:
            return kwargs[self.timestep_name]
        return args[self.timestep_at] if len(args) > self.timestep_at else None

    def _readable(self, value: Any, total: int | None) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            return None
        if isinstance(value, Tensor) and (
            not value.numel()
            or (value.device.type != "cpu" and (total is not None or self.cache.evented))
        ):
            return None
        number = signal.scalar(value)
        return number if math.isfinite(number) else None

    def _rule_timestep(self, call: Call) -> float | None:
        """The timestep that was told: by the config's callback, read once per step, or by the context."""
        callback = self.cache.timestep_callback
        if callback is None:
            return call.timestep
        value = callback()
        if value is None:
            return call.timestep
        try:
            number = signal.scalar(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"current_timestep_callback returned {value!r}, must return a number or a tensor of one"
            ) from error
        return number if math.isfinite(number) else None  # not a number: no rule may reuse

    def _planned_total(self) -> int | None:
        return next(
            (n for r in self.recipe.rules if (n := getattr(r.when, "num_inference_steps", None))),
            None,
        )

    def _refuse_training(self) -> None:
        if not (torch.is_grad_enabled() and self.model.training):
            return
        if any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "target: the model is in training mode with gradients on; a cached step has no gradient. "
                "Call model.eval(), run under torch.no_grad(), or cache.disable() first"
            )

    def abandon(self, request: Any) -> None:
        """Forget all contexts of a request: an exception passed through one of its calls."""
        for key, state in self.states.items():
            if key[0] == request:
                state.restart()

    def reset(self, request: Any = _UNSET) -> None:
        """Forget the runs of one request, or all; their storage serves the next ones."""
        for key in [k for k in self.states if request is _UNSET or k[0] == request]:
            state = self.states.pop(key)
            self.cache._run_ended(self, state)
            self._release(state)
        if request is _UNSET:
            self.ascending = False
            self.rises.clear()
            self.branches.clear()

    def nbytes(self) -> int:
        return sum(s.nbytes() for s in (*self.states.values(), *self.pool))


def _enabled_already(*args: Any, **kwargs: Any) -> None:
    """In place of a diffusers model's own `enable_cache`: two caches would each skip half of the other."""
    raise ValueError(
        "target: Caching has already been enabled with fastcache on this model; call cache.update(config) to "
        "change its settings or cache.disable() first"
    )
