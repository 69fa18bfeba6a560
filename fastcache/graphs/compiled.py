# SPDX-License-Identifier: Apache-2.0
"""fastcache.compile: one fullgraph callable per mode, chosen outside the graphs.

A mode is what the rules decided. Rules that decide beforehand need one graph per mode. FirstBlockCache
needs three: the head region leaves the model's own forward after its first block, the host reads one pair
of sums, and the forward is entered again for the rest of the step, computed or replayed; what the second
entry does not need before the first block is dead code to the compiler.

Not every program has to be a graph: with cudagraphs="reuse" those that compute all blocks are the model's own
forward, which for the rest of a step starts from what the head has left in storage.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..models.pipeline import denoisers_of
from ..policies import REUSE
from ..runtime.denoiser import Denoiser
from ..runtime.patch import ATTACHED
from ..targets.control import HEAD, PENDING, REST, Stop
from .on_device import OnDevice

ARGUMENT = re.compile(r"(L\[')?(args|kwargs)\b")  # a guard on what a program is called with


TRAINING = "AUTOGRAD_SAVED_TENSORS_HOOKS"  # a guard on what autograd alone asks for


# By choice of `cudagraphs`: whether a program is compiled, of its phase and its actions. What is compiled is
# captured too, unless the choice is False.
COMPILED: dict[bool | str, Callable[[str, Sequence[str]], bool]] = {
    False: lambda phase, actions: True,
    True: lambda phase, actions: True,
    "reuse": lambda phase, actions: phase == HEAD or REUSE in actions,
}


ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # torch 2.13


def compile_alone(function: Callable, options: dict[str, Any]) -> Callable:
    """torch.compile whose graphs do not count against those of other callables of the same code."""
    if options.get("options"):  # torch.compile takes out of them what is not the backend's
        options = {**options, "options": dict(options["options"])}
    if ISOLATES:
        options = {"isolate_recompiles": True, **options}
        return torch.compile(function, **options)
    if not isinstance(function, types.FunctionType):  # a module has no code object of its own
        module = function

        def function(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, **options)


def frozen_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of torch.compile with guards on nothing but a call's arguments and torch's global state."""
    given = options.get("options") or {}
    if "guard_filter_fn" in given:
        raise ValueError(
            "compile: frozen=True chooses the guards itself, but options has a guard_filter_fn too; leave "
            "one of them out"
        )
    if options.get("mode") is not None:  # which torch.compile takes instead of options
        from torch._inductor import list_mode_options

        given = list_mode_options(options["mode"])

    def keep(guards: Sequence[Any]) -> list[bool]:
        return [
            bool(ARGUMENT.match(guard.name)) if guard.name else guard.guard_type != TRAINING
            for guard in guards
        ]

    return {**options, "mode": None, "options": {**given, "guard_filter_fn": keep}}


class Programs:
    """The programs of one denoiser.

    made: one per mode.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        options: dict[str, Any],
        cudagraphs: bool | str,
        frozen: bool,
        on_device: bool,
    ) -> None:
        self.denoiser, self._options, self._compiles = denoiser, options, COMPILED[cudagraphs]
        self._captured, self._frozen = bool(cudagraphs), frozen
        self.made: dict[tuple, Callable] = {}
        # the recipes of single runs have their decisions read by the host
        decides = on_device and denoiser.settings.own
        self._decider = OnDevice(denoiser, self._compiled) if decides else None
        # of several requests: captured, each set of states would have a graph of its own
        self.batches = not (cudagraphs or decides)
        self._probed = next(
            (i for i, rule in enumerate(denoiser.recipe.rules) if rule.when.decides_inside), None
        )
        denoiser.ahead.owns_graphs = True
        denoiser.ahead.expect_graphs()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """One step whose storage exists: the program of its mode, or two around FirstBlock's decision.

        Raises Stop where samples of several requests have decided differently, after the first program.
        """
        control, probed = self.denoiser.control, self._probed
        if probed is None or control.actions[probed] != PENDING:
            return self._step(control.phase, args, kwargs)
        state = control.state
        decider = self.denoiser.targets[probed].decider
        if not decider.prepare_head(state):
            return self.denoiser.original(*args, **kwargs)
        if self._decider is not None:
            return self._decider.run(state, args, kwargs)
        self._step(HEAD, args, kwargs)
        decider.decide_with(decider.left_by_head(state))
        return self._step(REST, args, kwargs)

    def _step(self, phase: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One phase of a step: its compiled program, or the model's own forward."""
        control = self.denoiser.control
        control.phase = phase
        if not self._compiles(phase, control.actions):
            return self.denoiser.original(*args, **kwargs)
        program = self._program(*control.actions, control.batch, control.members, phase)
        return self._replayed(program, *args, **kwargs)

    def _replayed(self, program: Callable, *args: Any, **kwargs: Any) -> Any:
        """What a program returns, in memory that no later replay overwrites."""
        if not self._captured:
            return program(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()  # nothing of an earlier replay is still needed
        return tree_map_only(Tensor, Tensor.clone, program(*args, **kwargs))

    def _program(self, *mode: Any) -> Callable:
        if self._frozen:  # no guard looks at storage, and its layout follows from these
            mode = (*mode, self.denoiser.control.state.signature, self.denoiser.executor.cuts)
        if mode not in self.made:
            original = self.denoiser.original

            def program(*args: Any, **kwargs: Any) -> Any:
                try:
                    return original(*args, **kwargs)
                except Stop:  # not contextlib.suppress, which Dynamo of torch 2.10 cannot trace
                    return None

            self.made[mode] = self._compiled(program)
        return self.made[mode]

    def _compiled(self, program: Callable) -> Callable:
        return compile_alone(program, self._options)


class Compiled:
    """A callable with the model's signature. Attributes are the model's own.

    programs_of: makes the programs of a denoiser.
    """

    def __init__(self, denoiser: Denoiser, programs_of: Callable[[Denoiser], Programs]) -> None:
        self._model, self._programs_of = denoiser.model, programs_of
        self.__signature__ = inspect.signature(denoiser.original)
        functools.update_wrapper(self, denoiser.original, updated=())
        self._follow(denoiser)

    def _follow(self, denoiser: Denoiser) -> None:
        """Drive this denoiser: the model's first one, or what `update` or another `enable` put in its place."""
        self._denoiser = denoiser
        self._own = self._programs_of(denoiser)
        self._others: dict[Denoiser, Programs] = {}  # of the recipes of single runs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        denoiser = self._model.__dict__.get(ATTACHED)
        if denoiser is None:  # disabled since
            return self._model(*args, **kwargs)
        if denoiser is not self._denoiser:
            self._follow(denoiser)
        if denoiser.switch is not None:
            return denoiser.switch.call(args, kwargs, lambda meant: self.programs(meant).run)
        return denoiser.call(args, kwargs, self._own.run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def programs(self, denoiser: Denoiser) -> Programs:
        """What runs the steps of a denoiser of this model."""
        if denoiser is self._denoiser:
            return self._own
        if denoiser not in self._others:
            self._others = {d: p for d, p in self._others.items() if not d.ended}
            self._others[denoiser] = self._programs_of(denoiser)
        return self._others[denoiser]


def driven(call: Any) -> tuple[nn.Module, Callable[[Denoiser], Programs]] | None:
    """The model that a callable made by `compile` drives, and its programs by denoiser; None for anything else."""
    if type(call) is not Compiled:
        return None
    denoiser = call._model.__dict__.get(ATTACHED)
    if denoiser is not None and denoiser is not call._denoiser:
        call._follow(denoiser)
    return call._model, call.programs


def compile(
    model: Any,
    *,
    cudagraphs: bool | str = False,
    frozen: bool = False,
    on_device: bool = False,
    **kwargs: Any,
) -> Any:
    """Compile an enabled model: one fullgraph callable per mode, no recompiles between steps.

    Args:
        model: an nn.Module on which `fastcache.enable` was called.
        cudagraphs: whether Inductor, in its mode "reduce-overhead", also captures what is compiled as CUDA
            graphs and replays them. True: every mode. "reuse": the first block where a rule looks at it, and
            steps in which some rule reuses; steps that compute everything are not compiled at all, so that
            a stack of any depth takes seconds to build. They run the model's own forward, with compiled
            blocks after `model.compile_repeated_blocks()` or `block.compile()`; after a captured first block
            they start at the second one, and embedders before it run twice. Rules on modules still run every
            block in a reused step, and capture that. Outputs are copies, safe to hold over later steps.
            Before each replay `torch.compiler.cudagraph_mark_step_begin()` is called, which lets go of what
            other captured models of this process have returned: clone that, if it is still needed. A graph
            is recorded once per state, that is per context and concurrent request, and Inductor gives up
            after 128 (`torch._inductor.config.triton.cudagraph_unexpected_rerecord_limit`): raise the limit
            to serve more at a time. Not yet run on a GPU.
        frozen: a promise that the model's modules, attributes and adapters stay as they are at its first
            calls (weights may change in place); then only the arguments are guarded, which halves the host
            time of a reused step. After a change of the model, compile it anew.
        on_device: experimental, for FirstBlockCacheConfig and torch 2.12 or later: one graph decides and goes
            on by torch.cond, and fastcache reads nothing back before the run ends or `cache.stats` is looked
            at. Inductor itself reads the predicate once in a step, and captures no graph with torch.cond, so
            it excludes cudagraphs. As with frozen, changes of the model go unnoticed. Not yet run on a GPU.
        kwargs: as for torch.compile; fullgraph is True unless given.

    Returns:
        A callable with the model's signature, driven like the model itself.

    Raises:
        TypeError: the model is no nn.Module.
        ValueError: it is not enabled, cudagraphs cannot be had, or options exclude each other.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile: model is {type(model).__name__}, must be an nn.Module")
    if not isinstance(cudagraphs, bool | str) or cudagraphs not in COMPILED:
        raise ValueError(f'compile: cudagraphs is {cudagraphs!r}, must be False, True or "reuse"')
    if on_device and cudagraphs:
        raise ValueError(
            f"compile: cudagraphs={cudagraphs!r} and on_device=True exclude each other, since Inductor captures "
            "no graph that decides by torch.cond; leave one of the two out"
        )
    denoiser = denoisers_of(model)[0][1].__dict__.get(ATTACHED)
    if denoiser is None:
        raise ValueError(
            "compile: model is not enabled; call fastcache.enable(model, config) first, then fastcache.compile"
        )
    options = {"fullgraph": True, **kwargs}
    if cudagraphs:
        options = captured_options(denoiser.model, cudagraphs, options)
    if frozen:
        options = frozen_options(options)

    def programs_of(denoiser: Denoiser) -> Programs:
        return Programs(denoiser, options, cudagraphs, frozen, on_device)

    return Compiled(denoiser, programs_of)


def captured_options(
    model: nn.Module, cudagraphs: bool | str, options: dict[str, Any]
) -> dict[str, Any]:
    """The options of torch.compile under which Inductor captures what it compiles."""
    given = f"compile: cudagraphs={cudagraphs!r}"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise ValueError(f"{given}, but there is no CUDA device here; leave it out on this machine")
    devices = {p.device.type for p in model.parameters()}
    if devices - {"cuda"}:
        raise ValueError(
            f"{given}, but the model has parameters on {sorted(devices)}; move it with "
            "model.to('cuda') first"
        )
    taken = {"mode", "options", "backend"} & options.keys()
    if taken:
        raise ValueError(
            f"{given} sets Inductor's mode itself, but {sorted(taken)} came too; leave one of them out"
        )
    return {**options, "mode": "reduce-overhead"}
