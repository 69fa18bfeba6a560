"""What a config would do to a model, without running it: hooks, plan, graphs, memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ..cache import Cache, enable
from ..configs import Config
from ..graphs.compiled import COMPILED
from ..graphs.reentry import happens_twice
from ..models.adapter import BlockAdapter
from ..models.attention import attention_modules
from ..models.registry import adapter_for
from ..models.table import LIST_NAMES
from ..plan import Plan
from ..policies import COMPUTE, REUSE
from ..recipe import Recipe
from ..reporting.summary import describe
from ..runtime.denoiser import Denoiser
from ..targets.control import HEAD, PENDING, REST, WHOLE
from ..targets.spec import Modules
from ..targets.stack.target import StackTarget
from .memory import Shapes, stream_width, weight_bytes

SHOWN = 6


@dataclass(frozen=True)
class Inspection:
    """What was found; `text()` for people, `record()` for JSON."""

    model: str
    parameters: int
    rules: tuple[str, ...]
    hooked: tuple[tuple[str, ...], ...]  # per rule
    close_by: tuple[str, ...]  # not hooked, but of a similar name or kind
    steps: int
    plan: str | None  # None: decided while running
    graphs: int
    graphs_note: str
    captured: tuple[str, ...]  # those that cudagraphs="reuse" captures
    reentry: str | None  # None: no rule asks for it
    memory: dict[str, int]  # bytes of one context, per rule
    shapes: Shapes

    @property
    def nbytes(self) -> int:
        """Bytes for all contexts."""
        return sum(self.memory.values()) * self.shapes.contexts

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.nbytes}

    def text(self) -> str:
        s = self.shapes
        lines = [("model", f"{self.model}, {self.parameters / 1e6:,.2f} M parameters")]
        for rule, hooked in zip(self.rules, self.hooked, strict=True):
            lines += [("rule", rule), ("  hooks", _shortened(hooked))]
        lines.append(("close by", _shortened(self.close_by) or "nothing"))
        plan = self.plan or (
            f"{self.steps} steps, each decided while running, from what the first block returns"
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
    model: nn.Module,
    config: Config | Recipe,
    *,
    adapter: BlockAdapter | None = None,
    steps: int = 28,
    shapes: Shapes | None = None,
) -> Inspection:
    """Attach `config` to `model`, look, and take it off again; the meta device will do.

    Raises what `fastcache.enable` raises where nothing can be hooked.
    """
    if getattr(config, "current_timestep_callback", callable) is None:
        config = replace(config, current_timestep_callback=lambda: 0.0)  # type: ignore[type-var]
    with enable(model, config, adapter=adapter) as cache:
        denoiser = cache.denoisers[0]
        known = shapes or Shapes()
        known = replace(known, width=known.width or stream_width(denoiser))
        plan = _plan(cache, steps)
        graphs = _graphs(plan)
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


def _shortened(names: Sequence[str]) -> str:
    """Names that differ in numbers only are written once, with how many there are."""

    shapes = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    shown = [f"{name} ({n})" if n > 1 else name for name, n in shapes.items()]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def _plan(cache: Cache, steps: int) -> Plan | None:
    return None if cache.recipe.needs_signal else cache.recipe.plan(steps)


def _graphs(plan: Plan | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The programs of a compiled model by name, each with its phase and actions: one per combination that occurs."""
    if plan is None:
        return {
            "first block": (HEAD, (PENDING,)),
            "rest": (REST, (COMPUTE,)),
            "reuse": (REST, (REUSE,)),
        }
    modes = dict.fromkeys(zip(*plan.rows, strict=True))
    return {"compute" if set(m) == {COMPUTE} else "/".join(m): (WHOLE, m) for m in modes}


def _reentry(denoiser: Denoiser) -> str | None:
    """Whether the graphs of FirstBlock, which enter the model's code twice in a step, may do so."""
    for rule, target in zip(denoiser.recipe.rules, denoiser.targets, strict=True):
        if rule.when.needs_signal and isinstance(target, StackTarget):
            found = happens_twice(denoiser.original, [gate.name for gate in target.gates])
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
        if isinstance(rule.where, Modules):
            row = denoiser.cache.adapter or adapter_for(model)
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
