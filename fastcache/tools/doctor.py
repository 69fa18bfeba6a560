# SPDX-License-Identifier: Apache-2.0
"""Whether a cache will work on a pipeline or model, what it would hook, what could go wrong, and what to write."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..cache import Cache, enable
from ..configs import EasyCacheConfig
from ..configs.presets import preset, presets
from ..models.adapter import BlockAdapter
from ..models.pipeline import denoisers_of
from ..ops import dispatch
from ..reporting.summary import describe
from ..runtime.notices import FastcacheWarning
from ..runtime.patch import refuse_enabled
from .findings import ERROR, LOOKS, NOTE, WARNING, Finding, device_of, own_call
from .inspect import shortened
from .measure import generate_with

STEPS = 28  # of a run, where nobody says
FEW = 10  # steps, below which a mask for just so many may fit


@dataclass(frozen=True)
class Patient:
    """One denoiser of what was looked at.

    Args:
        name: in the pipeline, or its class.
        model: name of its class.
        parameters: how many numbers it has.
        dtype: of its weights, "" where it has none.
        device: kind of the device they lie on.
        kernels: backend of the ops there.
        hooked: dotted names of what would be hooked.
    """

    name: str
    model: str
    parameters: int
    dtype: str
    device: str
    kernels: str
    hooked: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Whether a cache will work, and why; `text()` is for people, `record()` for JSON.

    Args:
        target: class of the pipeline or model.
        method: the config as it is written, "" where none fits.
        rules: the method's rules in words.
        steps: denoiser calls of a run.
        computed: how many of them are computed; None: decided while running.
        denoisers: what would be hooked.
        tried: what one generation with the cache came to, "" where none was run.
        findings: what was seen, errors first.
        lines: what to write.
    """

    target: str
    method: str
    rules: tuple[str, ...]
    steps: int
    computed: int | None
    denoisers: tuple[Patient, ...]
    tried: str
    findings: tuple[Finding, ...]
    lines: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether anything will be cached."""
        return all(finding.level != ERROR for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """The fields as JSON takes them, with `works`."""
        return {
            "works": self.works,
            **vars(self),
            "denoisers": [vars(denoiser) for denoiser in self.denoisers],
            "findings": [vars(finding) for finding in self.findings],
        }

    def text(self) -> str:
        """The fields in plain text."""
        rows = [("works", self._verdict()), ("target", self.target)]
        for d in self.denoisers:
            about = f"{d.parameters / 1e6:,.2f} M parameters{', ' * bool(d.dtype)}{d.dtype}"
            rows.append((d.name, f"{d.model}, {about} on {d.device}, kernels: {d.kernels}"))
            rows.append(("  hooks", shortened(d.hooked)))
        if self.tried:
            rows.append(("tried", self.tried))
        for finding in self.findings:
            rows.append((finding.level, finding.what))
            rows += [("", f"-> {finding.do}")] * bool(finding.do)
        width = max(9, *(len(label) for label, _ in rows))
        told = [f"{label:<{width}}  {value}" for label, value in rows]
        if self.lines:
            told += ["", "what to write:", *(f"    {line}" for line in self.lines)]
        return "\n".join(told)

    def _verdict(self) -> str:
        if not self.works:
            return "no"
        computes = "decided while running"
        if self.computed is not None:
            computes = f"{self.computed} of {self.steps} steps computed"
        return f"yes, with {self.method}: {', '.join(self.rules)}, {computes}"


def diagnose(
    target: Any,
    config: Any = None,
    *,
    written: str = "config",
    run: Callable[..., Any] | None = None,
    adapter: BlockAdapter | None = None,
    steps: int | None = None,
) -> Diagnosis:
    """Whether a cache will work on a pipeline or model. It is attached and taken off again.

    Weights are not read unless `run` is given: a model on the meta device will do.

    Args:
        target: the pipeline or the nn.Module.
        config: what `fastcache.enable` takes; None: the first of `candidates` that fits.
        written: how the config is written in a program.
        run: one generation, tried once with the cache, as `fastcache.calibrate` takes it; None: none.
        adapter: as of `fastcache.enable`.
        steps: denoiser calls of a run; None: the pipeline's default, else 28.
    Returns:
        What was found. Nothing is raised for a target that cannot be cached: that is a finding.
    """
    steps = steps if steps is not None else steps_of(target)
    try:
        refuse_enabled(denoisers_of(target))
    except (TypeError, ValueError) as error:
        return _hopeless(target, steps, [Finding(ERROR, str(error), _others(target))])
    misfits: list[Finding] = []
    for name, given in candidates(steps) if config is None else [(written, config)]:
        try:
            found = _with(target, name, given, run, adapter, steps)
        except (TypeError, ValueError) as error:
            misfits.append(Finding(NOTE, f"{name} does not fit: {error}"))
            continue
        if found.works or config is not None:
            return replace(found, findings=(*found.findings, *misfits))
        misfits += [Finding(NOTE, f"{name}: {f.what}") for f in found.findings if f.level == ERROR]
    first, *rest = misfits
    return _hopeless(target, steps, [replace(first, level=ERROR), *rest])


def candidates(steps: int) -> Iterator[tuple[str, Any]]:
    """Methods that need no measuring, the best first, each as it is written and as it is.

    Args:
        steps: denoiser calls of a run.
    Returns:
        The preset for as few steps as this, the one for whole runs, and a method that asks nothing of a model.
    """
    for name in (f"mask/{steps}", "balanced"):
        if name == "balanced" or (steps < FEW and name in presets()):
            yield f'"{name}"', preset(name)
    yield "fastcache.EasyCacheConfig()", EasyCacheConfig()


def steps_of(target: Any) -> int:
    """Steps that a pipeline takes where it is not told, else 28."""
    call = None if isinstance(target, nn.Module) else own_call(target)
    if call is None:
        return STEPS
    said = inspect.signature(call).parameters.get("num_inference_steps")
    return said.default if said is not None and isinstance(said.default, int) else STEPS


def _with(
    target: Any,
    name: str,
    config: Any,
    run: Callable[..., Any] | None,
    adapter: BlockAdapter | None,
    steps: int,
) -> Diagnosis:
    """What there is to say of one method. Raises as `enable` does where it fits nothing."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with enable(target, config, adapter=adapter) as cache:
            findings = [finding for look in LOOKS for finding in look(target, cache)]
            plan = None if cache.recipe.needs_signal else cache.recipe.plan(steps)
            if plan is not None and len(plan.computed) == steps:
                findings.append(
                    Finding(ERROR, f"all of {steps} steps would be computed", "take more steps")
                )
            patients = tuple(_patient(cache, i) for i in range(len(cache.denoisers)))
            tried, outcome = ("", []) if run is None else _try(cache, run)
    own = []
    for w in said:
        if issubclass(w.category, FastcacheWarning):
            own.append(Finding(WARNING, str(w.message)))
        else:  # somebody else's
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    order = (ERROR, WARNING, NOTE)
    return Diagnosis(
        type(target).__name__,
        name,
        tuple(describe(rule) for rule in cache.recipe.rules),
        steps,
        None if plan is None else len(plan.computed),
        patients,
        tried,
        tuple(sorted([*outcome, *findings, *own], key=lambda f: order.index(f.level))),
        _lines(target, name),
    )


def _patient(cache: Cache, number: int) -> Patient:
    denoiser = cache.denoisers[number]
    model = denoiser.model
    first = next(model.parameters(), None)
    device = device_of(model)
    return Patient(
        "denoiser" if cache.target is model else denoiser.name,
        type(model).__name__,
        sum(p.numel() for p in model.parameters()),
        "" if first is None else str(first.dtype).removeprefix("torch."),
        device,
        "none" if device == "meta" else dispatch.active(device),
        tuple(cache.hooked()[denoiser.name]),
    )


def _try(cache: Cache, run: Callable[..., Any]) -> tuple[str, list[Finding]]:
    """One generation with the cache, in words, and what it has shown."""
    try:
        generate_with(run, cache)
    except Exception as error:  # whatever it is, it is the finding
        failed = f"a generation with the cache raised {type(error).__name__}: {error}"
        return "raised", [Finding(ERROR, failed, "see whether it does so without the cache too")]
    count = cache.stats
    text = f"{len(count)} calls: {count.computed} computed, {count.reused} reused"
    if not len(count):
        return text, [
            Finding(
                ERROR,
                "the generation never called the model's forward, or another object than this one",
                "enable the module that it calls",
            )
        ]
    if not count.reused:
        why = max({r.reason for r in count}, key=[r.reason for r in count].count)
        return text, [Finding(ERROR, f"nothing was reused; the commonest reason: {why}")]
    return text, []


def _lines(target: Any, written: str) -> tuple[str, ...]:
    if isinstance(target, nn.Module):
        return (
            f"cache = fastcache.enable(model, {written})",
            "with cache.run(num_inference_steps=len(timesteps)):  # around all steps of one generation",
            '    with cache.context("cond"):  # around each call of the model, a name per branch of guidance',
        )
    return (
        f"cache = fastcache.enable(pipe, {written})",
        "...  # call the pipeline as ever",
        "print(cache.summary())",
    )


def _others(target: Any) -> str:
    """Modules that a pipeline without a known denoiser has."""
    if isinstance(target, nn.Module):
        return ""
    parts = vars(target) if hasattr(target, "__dict__") else {}
    names = [name for name, value in parts.items() if isinstance(value, nn.Module)]
    return f"give the one that denoises, of {', '.join(names)}" if names else ""


def _hopeless(target: Any, steps: int, findings: list[Finding]) -> Diagnosis:
    return Diagnosis(type(target).__name__, "", (), steps, None, (), "", tuple(findings), ())
