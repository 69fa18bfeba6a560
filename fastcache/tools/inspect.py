# SPDX-License-Identifier: Apache-2.0
"""What a config would do to a model, without running it: hooks, plan, graphs, memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ..cache import Cache, enable
from ..configs.given import settings_of
from ..graphs.compiled import COMPILED
from ..graphs.reentry import happens_twice
from ..models.adapter import BlockAdapter
from ..models.attention import attention_modules
from ..models.table import LIST_NAMES
from ..plan import Plan
from ..policies import COMPUTE, REUSE
from ..reporting.summary import describe
from ..runtime.denoiser import Denoiser
from ..targets.control import HEAD, PENDING, REST, WHOLE
from .memory import Shapes, stream_width, weight_bytes

SHOWN = 6


@dataclass(frozen=True)
class Inspection:
    """What a config would do to a model; `text()` is for people, `record()` for JSON.

    Args:
        model: name of the model's class.
        parameters: how many numbers the model has.
        rules: the rules in words.
        hooked: per rule the dotted names of what it hooks.
        close_by: dotted names of what is not hooked, but of a similar name or kind.
        steps: denoiser calls of a run.
        plan: the schedule in words; None: decided while running.
        graphs: how many graphs a compiled model would have.
        graphs_note: which.
        captured: those that cudagraphs="reuse" captures.
        reentry: whether graphs may enter the model's code twice in a step; None: no rule asks for it.
        memory: bytes held for one context, by rule.
        shapes: sizes that the bytes are computed for.
    """

    model: str
    parameters: int
    rules: tuple[str, ...]
    hooked: tuple[tuple[str, ...], ...]
    close_by: tuple[str, ...]
    steps: int
    plan: str | None
    graphs: int
    graphs_note: str
    captured: tuple[str, ...]
    reentry: str | None
    memory: dict[str, int]
    shapes: Shapes

    @property
    def nbytes(self) -> int:
        """Bytes held for all contexts."""
        return sum(self.memory.values()) * self.shapes.contexts

    def record(self) -> dict[str, Any]:
        """The fields as JSON takes them, with `bytes` for all contexts."""
        return {**asdict(self), "bytes": self.nbytes}

    def text(self) -> str:
        """The fields as a table in plain text."""
        s = self.shapes
        lines = [("model", f"{self.model}, {self.parameters / 1e6:,.2f} M parameters")]
        for rule, hooked in zip(self.rules, self.hooked, strict=True):
            lines += [("rule", rule), ("  hooks", shortened(hooked))]
        lines.append(("close by", shortened(self.close_by) or "nothing"))
        plan = self.plan or (
            f"{self.steps} steps, each decided while running, from what is seen there"
        )
        lines.append(("plan", plan.replace("\n", "\n" + " " * 12)))
        lines.append(("graphs", f"{self.graphs} expected under compile: {self.graphs_note}"))
        lines.append(("captured", f'{", ".join(self.captured) or "none"}, with cudagraphs="reuse"'))
        if self.reentry is not None:
            lines.append(("re-entry", self.reentry))
        lines.append(
            (
                "memory",
                f"about {self.nbytes / 2**20:,.1f} MiB at batch {s.batch}, {s.tokens} + "
                f"{s.text_tokens} tokens of {s.width}, {s.dtype}, {s.contexts} context(s)",
            )
        )
        return "\n".join(f"{label:<10}  {value}" for label, value in lines)


def inspect_model(
    target: Any,
    config: Any,
    *,
    adapter: BlockAdapter | None = None,
    steps: int = 28,
    shapes: Shapes | None = None,
) -> Inspection:
    """What a config would hook, skip, compile and hold, without running the model.

    The config is attached and taken off again. Weights are not read: a model on the meta device will do.

    Args:
        target: a module or a pipeline, of which the first denoiser is looked at.
        config: what `fastcache.enable` takes.
        adapter: as of `fastcache.enable`.
        steps: denoiser calls of a run per context, for the plan.
        shapes: sizes of the hidden states, for the memory; None: 4096 + 512 tokens in bfloat16.
    Returns:
        What was found.
    Raises:
        TypeError, ValueError: as of `fastcache.enable`, such as where nothing can be hooked.
    """
    recipe, own = settings_of(config)
    if own is not None and hasattr(own, "current_timestep_callback") and not own.timestep_callback:
        own = replace(own, current_timestep_callback=lambda: 0.0)  # type: ignore[type-var]
    with enable(target, recipe if own is None else own, adapter=adapter) as cache:
        denoiser = cache.denoisers[0]
        known = shapes or Shapes()
        known = replace(known, width=known.width or stream_width(denoiser))
        plan = _plan(cache, steps)
        graphs = _graphs(plan, cache.recipe.decides_inside)
        rules = denoiser.recipe.rules
        return Inspection(
            type(denoiser.model).__name__,
            sum(p.numel() for p in denoiser.model.parameters()),
            tuple(map(describe, rules)),
            tuple(tuple(target.hooked()) for target in denoiser.targets),
            _close_by(denoiser),
            steps,
            None if plan is None else str(plan),
            len(graphs),
            ", ".join(graphs) + (", through fastcache.compile(model)" if plan is None else ""),
            tuple(name for name, program in graphs.items() if COMPILED["reuse"](*program)),
            _reentry(denoiser),
            {
                f"{i + 1}: {describe(rule)}": weight_bytes(denoiser, rule, target, known)
                for i, (rule, target) in enumerate(zip(rules, denoiser.targets, strict=True))
            },
            known,
        )


def shortened(names: Sequence[str]) -> str:
    """The names, where those that differ in numbers alone are written once with their count."""
    shapes = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    shown = [f"{name} ({n})" if n > 1 else name for name, n in shapes.items()]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def _plan(cache: Cache, steps: int) -> Plan | None:
    return None if cache.recipe.needs_signal else cache.recipe.plan(steps)


def _graphs(plan: Plan | None, inside: bool) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The programs of a compiled model by name, each with its phase and actions: one per combination that occurs."""
    if plan is None and not inside:  # what the call brings decides before it
        return {"compute": (WHOLE, (COMPUTE,)), "reuse": (WHOLE, (REUSE,))}
    if plan is None:
        return {
            "first block": (HEAD, (PENDING,)),
            "rest": (REST, (COMPUTE,)),
            "reuse": (REST, (REUSE,)),
        }
    modes = dict.fromkeys(zip(*plan.rows, strict=True))
    return {"compute" if set(m) == {COMPUTE} else "/".join(m): (WHOLE, m) for m in modes}


def _reentry(denoiser: Denoiser) -> str | None:
    """Whether graphs may enter the model's code twice in a step, as those of FirstBlock do."""
    for target in denoiser.targets:
        if target.decider.inside:
            found = happens_twice(denoiser.original, target.block_lists)
            if found is None:
                return "not known from its source whether graphs may enter its code twice in a step"
            if found:
                return f"graphs enter its code twice in a step, with this in it: {'; '.join(found)}"
            return "yes: graphs may enter its code twice in a step, nothing in it counts or draws"
    return None


def _close_by(denoiser: Denoiser) -> tuple[str, ...]:
    """Modules that a user might have expected to be hooked."""
    model, rules = denoiser.model, denoiser.recipe.rules
    hooked = [name for target in denoiser.targets for name in target.hooked()]
    found: list[str] = []
    for rule in rules:
        if rule.where.scope == "modules":
            row = denoiser.adapter
            found += [name for name, _ in attention_modules(model, row, everywhere=True)]
        else:
            found += [
                name
                for name, m in model.named_modules()
                if isinstance(m, nn.ModuleList) and name.rsplit(".", 1)[-1] in LIST_NAMES
            ]
    inside = [name.split(" ", 1)[0] for name in hooked]
    return tuple(
        name
        for name in dict.fromkeys(found)
        if not any(name == h or name.startswith(f"{h}.") for h in inside)
    )
