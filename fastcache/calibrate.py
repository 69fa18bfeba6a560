"""Measure a model once, keep the result as an object: magnitude ratios and first-block changes.

A calibration run computes every step. From it follow MagCache's ratios and, for any threshold, the
schedule that FirstBlockCache would have chosen along the same trajectory. It is saved as JSON only;
a file is read with its size, nesting and every value checked, and is never quoted in messages.
"""

from __future__ import annotations

import datetime
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import signal
from .adapters import BlockAdapter, BlockIO, adapter_for
from .configs import MagCacheConfig
from .policies import COMPUTE, REUSE, FirstBlock, Magnitude, Step
from .policies.base import real, whole
from .targets.bind import block_lists

if TYPE_CHECKING:
    from .denoiser import Denoiser
    from .runtime import Cache

FORMAT, VERSION = "fastcache-calibration", 1
MAX_BYTES = 4 << 20  # of a file
MAX_DEPTH = 6
MAX_PARTS = 200_000  # lists, objects and strings in a file
MAX_STEPS = 10_000
MAX_TEXT = 1000  # characters of a name
GAP = 32  # first-block changes are kept against this many earlier steps
SAMPLE = 1 << 18  # elements of a first-block residual that are compared, evenly spaced


class CalibrationError(ValueError):
    """A calibration that cannot be measured, loaded or used."""


class CalibrationNotFound(CalibrationError, FileNotFoundError):
    """There is no such calibration file."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Calibration:
    """What a model's run looks like to a cache.

    mag_ratios: mean over tokens of |r_i| / |r_(i-1)|, r the residual of all blocks, one per step;
    the first is 1. Mean over contexts and runs. contexts: the same by context, such as "cond" and
    "uncond". first_block: by context, row i holds the relative L1 change of block 0's residual at
    step i against steps i-1, i-2, ...; empty where it was not measured. steps: denoiser calls per
    context and run.
    """

    mag_ratios: tuple[float, ...]
    contexts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    first_block: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    model: str = ""
    scheduler: str = ""
    steps: int = 0
    runs: int = 1
    source: str = ""
    created: str = ""
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if self.format != FORMAT:
            raise CalibrationError(f"calibration: format must be {FORMAT!r}")
        if isinstance(self.version, bool) or self.version != VERSION:
            raise CalibrationError(
                f"calibration: version must be {VERSION}; this fastcache reads no other"
            )
        put("mag_ratios", _ratios("mag_ratios", self.mag_ratios))
        put("contexts", {n: _ratios("contexts", r) for n, r in _named("contexts", self.contexts)})
        put("first_block", {n: _rows(r) for n, r in _named("first_block", self.first_block)})
        for name in ("model", "scheduler", "source", "created"):
            if not _is_text(getattr(self, name)):
                raise CalibrationError(
                    f"calibration: {name} must be a string of at most {MAX_TEXT} characters"
                )
        put("steps", self.steps or len(self.mag_ratios))
        for name in ("steps", "runs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_STEPS:
                raise CalibrationError(
                    f"calibration: {name} must be a whole number in 1..{MAX_STEPS}"
                )

    def __getitem__(self, context: str) -> tuple[float, ...]:
        return self.contexts[context]

    def __str__(self) -> str:
        ratios = self.mag_ratios[1:] or self.mag_ratios
        return (
            f"calibration of {self.model or 'a model'}, {self.steps} steps, contexts "
            f"{list(self.contexts)}: ratios {min(ratios):.3f} to {max(ratios):.3f}"
        )

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the calibration as JSON and return the path."""
        path = Path(path)
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration.

        Raises CalibrationError, a ValueError, that says what is wrong with the file; for a missing
        one CalibrationNotFound, which is a FileNotFoundError too.
        """
        path = Path(path)
        values = _parse(_read(path), path)
        known = {f.name for f in fields(cls)}
        problem = ""
        if not isinstance(values, dict):
            problem = "must hold a JSON object"
        elif missing := [n for n in ("format", "version", "mag_ratios") if n not in values]:
            problem = f"has no {missing[0]}"
        if problem:
            raise CalibrationError(f"calibration {path}: {problem}")
        try:
            return cls(**{k: v for k, v in values.items() if k in known})
        except CalibrationError as error:
            problem = str(error).removeprefix("calibration: ")
        raise CalibrationError(f"calibration {path}: {problem}")

    # --- using it ------------------------------------------------------------------------------

    def config(self, **overrides: Any) -> MagCacheConfig:
        """A MagCacheConfig with these ratios and steps; `overrides` are its other fields."""
        return MagCacheConfig(
            **{"num_inference_steps": self.steps, "mag_ratios": self.mag_ratios, **overrides}
        )

    def computed_steps(self, threshold: float, context: str | None = None, **guards: Any) -> list:
        """Steps that FirstBlockCache computes at a threshold, along the calibrated trajectory.

        guards: of `fastcache.FirstBlock`. context: None takes the first one.
        """
        rows = self._rows_of(context)
        policy = FirstBlock(threshold, **guards)
        run, computed = policy.begin(len(rows)), [0]
        policy.decide(run, Step(0, len(rows)))
        for i in range(1, len(rows)):
            back = i - computed[-1]
            change = rows[i][back - 1] if back <= len(rows[i]) else None
            if policy.decide(run, Step(i, len(rows)), change).action != REUSE:
                computed.append(i)
        return computed

    def first_block_share(self, threshold: float, **guards: Any) -> float:
        """Share of steps that FirstBlockCache computes at a threshold, over all contexts."""
        self._rows_of(None)
        counts = [len(self.computed_steps(threshold, name, **guards)) for name in self.first_block]
        return sum(counts) / sum(map(len, self.first_block.values()))

    def first_block_threshold(self, target_fraction: float, **guards: Any) -> float:
        """The smallest threshold at which FirstBlockCache computes at most this share of steps."""
        target = _share(target_fraction)
        seen = sorted({c for rows in self.first_block.values() for row in rows for c in row})
        for threshold in (0.0, *(_up(c) for c in seen if math.isfinite(c))):
            if self.first_block_share(threshold, **guards) <= target:
                return threshold
        least = self.first_block_share(math.ceil(seen[-1] + 1) if seen else 1.0, **guards)
        raise CalibrationError(
            f"calibration: target_fraction is {target:g}, but no threshold computes fewer than "
            f"{least:.0%} of the steps; ask for more, or lower warmup"
        )

    def mag_threshold(self, target_fraction: float, **fields: Any) -> float:
        """The smallest threshold at which MagCache computes at most this share of the steps.

        fields: others of `fastcache.Magnitude`, such as max_skip_steps and retention_ratio.
        """
        target = _share(target_fraction)
        for i in range(1, 401):
            threshold = i / 100 if i <= 100 else 1.02 ** (i - 100)
            if self.mag_share(threshold, **fields) <= target:
                return round(threshold, 4)
        raise CalibrationError(
            f"calibration: target_fraction is {target:g}, but no threshold computes fewer than "
            f"{self.mag_share(1e6, **fields):.0%} of the steps; raise max_skip_steps or lower "
            "retention_ratio"
        )

    def mag_share(self, threshold: float, **fields: Any) -> float:
        """Share of steps that MagCache computes at a threshold."""
        values = {"num_inference_steps": self.steps, "mag_ratios": self.mag_ratios, **fields}
        policy = Magnitude(threshold, **values).guarded(warmup=0, max_skips=0, last=False)
        run = policy.begin(self.steps)
        steps = [policy.decide(run, Step(i, self.steps)).action for i in range(self.steps)]
        return steps.count(COMPUTE) / self.steps

    def plot(self, path: str | Path) -> Path:
        """Draw the ratios, the first-block changes and what a threshold buys into a picture."""
        from .report import plot_calibration

        return plot_calibration(self, path)

    def _rows_of(self, context: str | None) -> tuple[tuple[float, ...], ...]:
        if not self.first_block:
            raise CalibrationError(
                "calibration: first_block is empty; fastcache.calibrate(run, target) records it"
            )
        if context is None:
            return next(iter(self.first_block.values()))
        if context not in self.first_block:
            raise CalibrationError(f"calibration: context must be one of {list(self.first_block)}")
        return self.first_block[context]


# --- measuring --------------------------------------------------------------------------------


def calibrate(
    run: Callable[..., Any] | Sequence[Callable[..., Any]],
    target: Any,
    *,
    num_inference_steps: int | None = None,
    contexts: Sequence[str] | None = None,
    model: str | None = None,
    scheduler: str | None = None,
    source: str = "",
    adapter: BlockAdapter | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Calibration:
    """Measure a model or pipeline while `run` generates with it, every step computed.

    run: a callable that performs one generation, called without arguments, or with the cache where
    it takes a required argument or one named `cache` (a hand-written loop opens `cache.context`);
    several callables, one per prompt or seed, are averaged. num_inference_steps: denoiser calls
    expected per context, checked. contexts: names to keep, all by default. model, scheduler and
    source: names to record. progress: show a progress line.
    Raises CalibrationError, a ValueError, where nothing usable was measured. The model is as before
    afterwards, also after an error.
    """
    from .context import eagerly
    from .runtime import enable

    jobs = [run] if callable(run) else list(run) if isinstance(run, Sequence) else []
    if not jobs or not all(map(callable, jobs)):
        raise TypeError(
            f"calibrate: run is {type(run).__name__}, must be a callable that performs one "
            "generation, or several"
        )
    expected = num_inference_steps
    if expected is not None:
        whole("calibrate", "num_inference_steps", expected, 1, MAX_STEPS)
    cache = enable(target, MagCacheConfig(calibrate=True), adapter=adapter, backend=backend)
    total = None if expected is None else expected * len(jobs)
    with cache, watch_first_blocks(cache) as watched, torch.no_grad(), eagerly(True):
        with cache.progress(total, desc="calibrate") if progress else nullcontext():
            for job in jobs:
                generate_with(job, cache)
                cache.reset()
    names = {
        "model": model or _model_name(cache),
        "scheduler": scheduler or type(getattr(target, "scheduler", None)).__name__,
    }
    if names["scheduler"] == "NoneType":
        names["scheduler"] = ""
    return collect(cache, watched, contexts, expected, source=source, **names)


def generate_with(job: Callable, cache: Cache) -> None:
    """Call a run in the way it wants to be called."""
    try:
        parameters = inspect.signature(job).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    if "cache" in parameters and parameters["cache"].kind is not inspect.Parameter.POSITIONAL_ONLY:
        job(cache=cache)
    elif any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters.values()
    ):
        job(cache)
    else:
        job()


def _model_name(cache: Cache) -> str:
    return ", ".join(dict.fromkeys(type(model).__name__ for _, model in cache._models))


def collect(
    cache: Cache,
    watched: Mapping[tuple[str, str], list] | None = None,
    contexts: Sequence[str] | None = None,
    steps: int | None = None,
    **names: Any,
) -> Calibration:
    """What a cache with `MagCacheConfig(calibrate=True)` has measured, from all its runs."""
    runs: dict[tuple[str, str], list[list[float]]] = {}
    for key, measured, count in _measured(cache):
        runs.setdefault(key, []).append(_per_step(signal.numbers(measured), count))
    if not runs:
        raise CalibrationError(
            "calibration: nothing was measured; enable with MagCacheConfig(calibrate=True) and run "
            "the model, or use fastcache.calibrate(run, target), whose run must call the target"
        )
    several = len({model for model, _ in runs}) > 1
    label = lambda key: f"{key[0]}/{key[1]}" if several else key[1]  # noqa: E731
    ratios = {label(key): _mean(_whole(lists), label(key)) for key, lists in runs.items()}
    if contexts is not None:
        if missing := [name for name in contexts if name not in ratios]:
            raise CalibrationError(
                f"calibration: contexts holds {missing[0]!r}, but the run used {list(ratios)}"
            )
        ratios = {name: ratios[name] for name in contexts}
    length = max(map(len, ratios.values()))
    if steps is not None and length != steps:
        raise CalibrationError(
            f"calibration: num_inference_steps is {steps}, but the run made {length} model calls "
            "per context; count calls, not scheduler steps, or leave it out"
        )
    changes = {label(key): rows for key, rows in (watched or {}).items() if label(key) in ratios}
    return Calibration(
        _mean(_whole(list(ratios.values())), "mag_ratios"),
        ratios,
        {name: tuple(map(tuple, rows)) for name, rows in changes.items()},
        steps=length,
        runs=max(map(len, runs.values())),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **{"model": _model_name(cache), **names},
    )


def _measured(cache: Cache) -> Iterator[tuple[tuple[str, str], list[Tensor], int]]:
    """(model, context), ratios and steps of every run, finished or still going on."""
    for key, finished in cache._measured.items():
        yield from ((key, measured, count) for measured, count in finished)
    for denoiser in cache.denoisers:
        for state in denoiser.slots.states.values():
            if state.index and state.measured:
                yield (denoiser.name, state.key[1]), state.measured, state.timelines[0].pushes


def _per_step(ratios: Sequence[float], steps: int) -> list[float]:
    """One ratio per step: the mean over the parts of a stack whose lists have no common residual."""
    parts = max(len(ratios) // max(steps, 1), 1)
    return [sum(ratios[i : i + parts]) / parts for i in range(0, parts * steps, parts)]


def _whole(runs: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The runs of full length: one that was cut short says nothing about the rest."""
    longest = max(map(len, runs))
    return [run for run in runs if len(run) == longest]


def _mean(runs: Sequence[Sequence[float]], name: str) -> tuple[float, ...]:
    means = tuple(sum(column) / len(runs) for column in zip(*runs, strict=True))
    for step, value in enumerate(means):
        if not math.isfinite(value) or value <= 0:
            raise CalibrationError(
                f"calibration: the ratio of step {step} in {name!r} is {value}; the model produced "
                "NaN or infinity, or its blocks add exactly nothing"
            )
    return means


# --- the first block --------------------------------------------------------------------------


@contextmanager
def watch_first_blocks(cache: Cache) -> Iterator[dict[tuple[str, str], list[list[float]]]]:
    """While open, the first block of every model is watched; what was seen is there at the end.

    Per (model, context), row i: relative L1 change of the residual at step i against i-1, i-2, ...
    """
    watchers = [FirstBlockWatcher(denoiser, cache.adapter) for denoiser in cache.denoisers]
    changes: dict[tuple[str, str], list[list[float]]] = {}
    try:
        yield changes
    finally:
        for watcher in watchers:
            watcher.handle.remove()
    for watcher in watchers:
        for context, rows in watcher.rows().items():
            changes[watcher.denoiser.name, context] = rows


class FirstBlockWatcher:
    """Compares the residual of a model's first block with those of earlier steps, on the device."""

    def __init__(self, denoiser: Denoiser, adapter: BlockAdapter | None) -> None:
        row = adapter or adapter_for(denoiser.model)
        block = block_lists(denoiser.model, row)[0][1]._modules["0"]
        self.denoiser, self.io = denoiser, BlockIO(block, row.block)
        self.samples: dict[Any, list[Tensor]] = {}  # newest first
        self.sums: dict[Any, list[list[Tensor]]] = {}
        self.before: Tensor | None = None
        # the input is read before the block runs, which may write into it
        pre = block.register_forward_pre_hook(self.entering, with_kwargs=True)
        post = block.register_forward_hook(self.left, with_kwargs=True)
        self.handle = _Both(pre, post)

    def entering(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden, _ = self.io.read(args, kwargs)
        self.before = _sample(hidden).clone()

    def left(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        hidden, encoder = self.io.read(args, kwargs)
        at, _ = self.io.positions(output, hidden, encoder)
        state = self.denoiser.control.state
        if state is None or self.before is None:
            return
        index, key = state.armed_step or 0, state.key
        if index == 0 or key not in self.samples:
            self.samples[key], self.sums[key] = [], []
        after, before = _sample(output if at is None else output[at]), self.before
        if after.shape != before.shape:
            return
        kept = self.samples[key]
        self.sums[key].append(
            [torch.ops.fastcache.residual_l1.default(after, before, prev) for prev in kept]
        )
        residual = torch.empty_like(after)
        torch.ops.fastcache.residual_store_.default(residual, after, before)
        self.samples[key] = [residual, *kept[: GAP - 1]]

    def rows(self) -> dict[str, list[list[float]]]:
        """By context; of several requests or runs the last one."""
        found = {}
        for (_, context), steps in self.sums.items():
            numbers = iter(signal.numbers([s for row in steps for s in row]))
            found[context] = [
                [_relative(next(numbers), next(numbers)) for _ in row] for row in steps
            ]
        return found


@dataclass
class _Both:
    pre: Any
    post: Any

    def remove(self) -> None:
        self.pre.remove()
        self.post.remove()


def _sample(value: Tensor) -> Tensor:
    """The values of a hidden state, or evenly spaced ones where there are very many."""
    flat = value.detach().reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLE)].contiguous()


def _relative(change: float, size: float) -> float:
    """Rounded for the file; where it is no number, larger than any threshold."""
    value = change / size if size else math.inf
    return float(f"{value:.6g}") if math.isfinite(value) else 1e30


# --- reading ----------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    """A file's bytes, at most MAX_BYTES of them."""
    if not path.exists():
        raise CalibrationNotFound(
            f"calibration {path}: no such file; fastcache.calibrate(...).save(path) writes one"
        )
    if not path.is_file():
        raise CalibrationError(f"calibration {path}: must be a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1) if path.stat().st_size <= MAX_BYTES else b""
    if len(data) > MAX_BYTES or (not data and path.stat().st_size):
        raise CalibrationError(
            f"calibration {path}: is larger than {MAX_BYTES >> 20} MiB, which no calibration is"
        )
    return data


def _parse(data: bytes, path: Path) -> Any:
    """JSON, its nesting limited before it is parsed. What the file holds never enters a message."""
    problem = _too_deep(data)
    if not problem:
        try:
            return json.loads(data.decode("utf-8"), parse_constant=_refuse, parse_int=_short_int)
        except UnicodeDecodeError:
            problem = "is not UTF-8 text; calibration files are JSON only"
        except json.JSONDecodeError as error:
            problem = f"is not JSON (line {error.lineno}, column {error.colno})"
        except (ValueError, RecursionError) as error:
            problem = str(error) if isinstance(error, CalibrationError) else "is not JSON"
    raise CalibrationError(f"calibration {path}: {problem}")


_MARK = re.compile(rb'["\[\]{}]')


def _too_deep(data: bytes) -> str:
    """What is wrong with the nesting of a JSON text, or ""; strings are stepped over. Linear."""
    depth = position = 0
    for _ in range(MAX_PARTS):
        mark = _MARK.search(data, position)
        if mark is None:
            return ""
        position = mark.end()
        if mark.group() == b'"':
            position = _string_end(data, position)
        else:
            depth += 1 if mark.group() in b"[{" else -1
        if depth > MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} levels, which no calibration is"
    return "holds more lists and strings than any calibration does"


def _string_end(data: bytes, position: int) -> int:
    """Where the string that began before `position` ends; the end of the data for an open one."""
    while (end := data.find(b'"', position)) >= 0:
        slashes = end
        while slashes > position and data[slashes - 1] == 0x5C:
            slashes -= 1
        position = end + 1
        if (end - slashes) % 2 == 0:
            return position
    return len(data)


def _refuse(name: str) -> float:
    raise CalibrationError("holds NaN or Infinity; every number must be finite")


def _short_int(digits: str) -> int:
    if len(digits) > 32:
        raise CalibrationError("holds a number of more than 32 digits")
    return int(digits)


# --- checking ---------------------------------------------------------------------------------


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _ratios(name: str, values: object) -> tuple[float, ...]:
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__iter__"):
        raise CalibrationError(f"calibration: {name} must be a list of numbers")
    ratios = tuple(values.tolist() if isinstance(values, Tensor) else values)
    if not 1 <= len(ratios) <= MAX_STEPS:
        raise CalibrationError(f"calibration: {name} must hold 1 to {MAX_STEPS} ratios")
    if not all(_number(r) and r > 0 for r in ratios):
        raise CalibrationError(f"calibration: {name} must hold finite positive numbers only")
    return tuple(map(float, ratios))


def _rows(rows: object) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, list | tuple) or not 1 <= len(rows) <= MAX_STEPS:
        raise CalibrationError("calibration: first_block must hold one list per step")
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) > i:
            raise CalibrationError(
                "calibration: first_block must hold, per step, changes against earlier steps"
            )
        if not all(_number(c) and c >= 0 for c in row):
            raise CalibrationError("calibration: first_block must hold finite numbers >= 0 only")
    return tuple(tuple(map(float, row)) for row in rows)


def _named(name: str, table: object) -> Iterator[tuple[str, Any]]:
    if not isinstance(table, Mapping) or not all(map(_is_text, table)):
        raise CalibrationError(f"calibration: {name} must be an object keyed by context")
    return iter(table.items())


def _share(value: object) -> float:
    share = real("calibration", "target_fraction", value, 0.0)
    if not 0 < share <= 1:
        raise CalibrationError(f"calibration: target_fraction is {share:g}, must be in (0, 1]")
    return share


def _up(value: float) -> float:
    """The next number of four digits that is not below `value`."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return float(f"{math.ceil(value / scale - 1e-9) * scale:.6g}")
