"""Latency and memory of computed and reused steps: fastcache, diffusers' hooks and cache-dit.

    python -m bench steps --json out.jsonl

All systems follow one schedule: the first 4 of 28 steps computed, then every third (methods on modules
come as near as their fields allow, alike on both sides). Only cost is
compared; weights may be random. "own" is a reused step less the modules that must still run: in every
round the same model without its skipped blocks runs right before, and the two are subtracted step by
step, each side as it is in its quiet rounds. What the first block takes, eagerly on a CPU, is taken off
either first. "passes alone" is that model with the arithmetic of a reused step written into it, and
nothing that decides or keeps books: no cache can cost less.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastcache
from fastcache import FirstBlock, Guided, Mask, Recipe, Reuse, Stack, Taylor
from fastcache.ops import dispatch

from . import common, systems
from .common import Row
from .models import FLUX, MODELS, Subject
from .systems import Attached

STEPS, WARMUP, EVERY = 28, 4, 3
BATCHES = (1, 8, 64)
STACK_METHODS = ("MagCache", "FirstBlock", "Taylor on the stack")
METHODS = (*STACK_METHODS, "Guided", "TaylorSeer", "PAB", "FasterCache")
FLOORS = {
    0: "no blocks",
    1: "first block only",
}  # what a reused step must still run, by blocks kept
PASSES = "passes alone"
FROZEN = "compile(frozen=True)"
OUR_KEPT = {"MagCache": 0, "FirstBlock": 1, "Taylor on the stack": 0, "Guided": 1}


def schedule(steps: int) -> list[bool]:
    """True for computed steps."""
    return [i < WARMUP or (i - WARMUP + 1) % EVERY == 0 for i in range(steps)]


def idle() -> None:
    """Nothing to wait for on a CPU."""


def own_plan(method: str, steps: int) -> list[bool]:
    """The schedule that a method keeps: the common one, or for modules the nearest they can express."""
    if method == "TaylorSeer":
        return [i < WARMUP or (i - WARMUP - 1) % EVERY == 0 for i in range(steps)]
    if method in ("PAB", "FasterCache"):
        return [i % EVERY == 0 or timestep(i, steps) >= 900 for i in range(steps)]
    return schedule(steps)


def timestep(step: int, steps: int) -> float:
    return 1000.0 * (1 - step / steps)


class Inside:
    """Counts the seconds that blocks of one class take, while it is entered."""

    seconds = 0.0

    @contextmanager
    def __call__(self, kind: Any) -> Iterator[None]:
        forward, now = kind.forward, common.clock()

        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return forward(*args, **kwargs)
            finally:
                self.seconds += now() - start

        kind.forward = timed
        try:
            yield
        finally:
            kind.forward = forward


INSIDE = Inside()


class Passes(nn.Module):
    """In the place of FLUX's blocks: what must be done with a hidden state on a reused step, and no more.

    block: a first block that is run and looked at, or None.
    """

    def __init__(self, block: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.residual: Any = None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **inputs: Any) -> Any:
        x = hidden_states
        if self.residual is None:
            self.residual = torch.zeros_like(x)
            self.look = dispatch.resolve("residual_l1", [x, x, self.residual])[0]
        if self.block is None:
            return encoder_hidden_states, x + self.residual
        text, y = self.block(x, encoder_hidden_states, **inputs)
        change, size = self.look(y, x, self.residual).tolist()
        self.change = change / (size or 1.0)
        return text, y + self.residual

    __call__ = forward  # without what modules do around it


# --- contenders -----------------------------------------------------------------------------------------


@dataclass
class Contender:
    """One way to make a run. force: told before every step whether it must compute."""

    system: str
    method: str
    compiled: str
    call: Callable[..., Any]
    attached: Attached | None = None
    force: Callable[[bool], object] | None = None
    kept: int | None = None  # blocks that a reused step still runs; None: has no floor
    part: nn.Module | None = None  # what a floor runs on reused steps
    times: list[list[float]] = field(default_factory=list)
    around: list[float] = field(default_factory=list)  # of the last run: steps less their blocks
    pairs: list[tuple] = field(default_factory=list)  # the same of each round, and of the floor's
    peak: int | None = None  # most bytes alive in a run from nothing, eager

    def above(self, floor: Contender, subject: Subject, sync: Callable[[], object]) -> None:
        """A run of the floor, then one of this, on the same schedule."""
        floor.run(subject, sync)
        floor.times.pop()
        below = floor.around
        self.run(subject, sync)
        self.pairs.append((self.around, below))

    def own(self) -> list[float]:
        """Seconds that each reused step takes above the floor's: other load on the machine only ever adds to a
        time, so each side is its 20th percentile over the rounds."""
        mine, below = (zip(*rounds, strict=True) for rounds in zip(*self.pairs, strict=True))
        quiet = [[common.quantiles(times)["p20"] for times in side] for side in (mine, below)]
        plan = schedule(len(quiet[0]))
        return [a - b for computed, a, b in zip(plan, *quiet, strict=True) if not computed]

    def run(self, subject: Subject, sync: Callable[[], object]) -> None:
        """One whole run, timed step by step."""
        steps, plan, times = len(subject.calls), schedule(len(subject.calls)), []
        now = time.perf_counter if sync is not idle else common.clock()
        self.around = []
        for i, inputs in enumerate(subject.calls):
            systems.CLOCK["t"] = t = timestep(i, steps)
            if self.force is not None:
                self.force(plan[i])
            sync()
            INSIDE.seconds = 0.0
            start = now()
            with self._context(i, steps, t):
                self.call(**inputs)
            sync()
            times.append(now() - start)
            self.around.append(times[-1] - INSIDE.seconds)
        if self.attached is not None:
            self.attached.reset()
        self.times.append(times)

    def _context(self, step: int, steps: int, timestep: float) -> AbstractContextManager[Any]:
        if self.attached is None:
            return nullcontext()
        return self.attached.context("cond", step, steps, timestep)


def contenders(subject: Subject, mode: str) -> Iterator[Contender]:
    """Everything that is compared on one model, each with modules of its own.

    mode: "eager", "compiled" or "both".
    """
    plan = schedule(len(subject.calls))
    if mode != "compiled":
        yield from _eager(subject, plan)
    if mode != "eager":
        yield from _compiled(subject, plan)


def _eager(subject: Subject, plan: list[bool]) -> Iterator[Contender]:
    yield Contender("uncached", "uncached", "", subject.twin())
    for kept, name in FLOORS.items():
        yield _floor(subject, kept, name)
    if subject.lists == FLUX:
        for method, kept in (("MagCache", 0), ("FirstBlock", 1)):
            part: Any = subject.without_blocks(kept)
            first = list(part.transformer_blocks)
            part.transformer_blocks = nn.ModuleList([Passes(*first or [None])])
            yield _floor(subject, kept, method, part=part, system=PASSES)
    for method, config in _our_configs(plan).items():
        model = subject.twin()
        attached = systems.attach_fastcache(model, config)
        kept = OUR_KEPT.get(method)
        yield Contender("fastcache", method, "", model, attached, kept=kept)
    if not systems.missing("diffusers"):
        yield from _diffusers(subject, plan)
    if not systems.missing("cache-dit"):
        yield from _cache_dit(subject, plan)


def _floor(
    subject: Subject,
    kept: int,
    name: str,
    compiled: str = "",
    part: nn.Module | None = None,
    system: str = "uncached",
) -> Contender:
    """What a reused step of a stack cache cannot go below: the model without the blocks that it skips.

    On the schedule of the others, so that it too starts from caches that a whole step has filled.
    """
    whole = subject.twin()
    part = subject.without_blocks(kept) if part is None else part
    turn: dict[str, Any] = {"model": whole}
    if compiled:
        part = torch.compile(part)  # type: ignore[assignment]
    return Contender(
        system,
        name,
        compiled,
        lambda **inputs: turn["model"](**inputs),
        force=lambda compute: turn.update(model=whole if compute else part),
        kept=kept,  # against itself: what the measure cannot resolve
        part=part,
    )


def _our_configs(plan: list[bool]) -> dict[str, Any]:
    steps = len(plan)
    mask = Mask(plan, warmup=0, last=False)
    forced = FirstBlock(1e9, warmup=WARMUP, max_skips=EVERY - 1)
    return {
        "MagCache": fastcache.MagCacheConfig(**_magnitude(steps), mag_ratios=[1.0] * steps),
        "FirstBlock": Recipe(forced, Reuse(), Stack()),
        "Taylor on the stack": Recipe(mask, Taylor(1), Stack()),
        "Guided": Recipe(mask, Guided(), Stack()),
        **_module_configs(fastcache),
    }


def _magnitude(steps: int) -> dict[str, Any]:
    """MagCache's fields that give the common schedule with ratios of one."""
    retention = WARMUP / steps
    return {"threshold": 1e9, "max_skip_steps": EVERY - 1, "retention_ratio": retention} | {
        "num_inference_steps": steps
    }


def _module_configs(library: Any) -> dict[str, Any]:
    """Methods on modules, as documented; see `own_plan`."""
    return {
        "TaylorSeer": library.TaylorSeerCacheConfig(
            cache_interval=EVERY,
            disable_cache_before_step=WARMUP,
            taylor_factors_dtype=torch.float32,
        ),
        "PAB": library.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=EVERY,
            spatial_attention_timestep_skip_range=(-1, 900),
            current_timestep_callback=systems.now,
        ),
        "FasterCache": library.FasterCacheConfig(
            spatial_attention_block_skip_range=EVERY,
            spatial_attention_timestep_skip_range=(-1, 900),
            is_guidance_distilled=True,
            current_timestep_callback=systems.now,
        ),
    }


def _diffusers(subject: Subject, plan: list[bool]) -> Iterator[Contender]:
    from diffusers import hooks

    steps = len(plan)
    configs = {
        "MagCache": hooks.MagCacheConfig(**_magnitude(steps), mag_ratios=torch.ones(steps)),
        "FirstBlock": hooks.FirstBlockCacheConfig(threshold=0.0),
        **_module_configs(hooks),
    }
    for method, config in configs.items():
        model = subject.twin()
        attached = systems.attach_diffusers(model, config)
        force = _threshold_switch(model) if method == "FirstBlock" else None
        kept = {"FirstBlock": 1, "MagCache": 0}.get(method)
        yield Contender("diffusers", method, "", model, attached, force, kept)


def _threshold_switch(model: nn.Module) -> Callable[[bool], object]:
    """diffusers' FirstBlockCache knows no schedule: move its threshold before every step."""
    hooks = [
        hook
        for module in model.modules()
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        if hasattr(hook, "threshold")
    ]

    def force(compute: bool) -> None:
        for hook in hooks:
            hook.threshold = -1.0 if compute else 1e9

    return force


def _cache_dit(subject: Subject, plan: list[bool]) -> Iterator[Contender]:
    for method, order in (("FirstBlock", 0), ("Taylor on the stack", 1)):
        model = subject.twin()
        mask = [int(c) for c in plan]
        attached = systems.attach_cache_dit(
            model, order=order, steps=len(plan), warmup=WARMUP, mask=mask
        )
        yield Contender("cache-dit", method, "", model, attached, kept=1)


def _compiled(subject: Subject, plan: list[bool]) -> Iterator[Contender]:
    """The same under Inductor; peers as they compose best with it."""
    plain: Any = subject.twin()
    plain.compile_repeated_blocks()
    yield Contender("uncached", "uncached", "repeated blocks", plain)
    ours = {k: c for k, c in _our_configs(plan).items() if k in STACK_METHODS}
    for method, config in ours.items():
        model: Any = subject.twin()
        attached = systems.attach_fastcache(model, config)
        model.compile_repeated_blocks(fullgraph=True)
        yield Contender("fastcache", method, "repeated blocks", model, attached)
    if not systems.missing("cache-dit"):
        for other in _cache_dit(subject, plan):
            other.call.compile_repeated_blocks()  # type: ignore[attr-defined]
            other.compiled, other.kept = "repeated blocks", None
            yield other
    yield Contender("uncached", "uncached", "torch.compile", torch.compile(subject.twin()))
    for kept, name in FLOORS.items():
        yield _floor(subject, kept, name, "torch.compile")
    for (method, config), frozen in itertools.product(ours.items(), (False, True)):
        model = subject.twin()
        attached = systems.attach_fastcache(model, config)
        call, how = (
            fastcache.compile(model, frozen=frozen),
            FROZEN if frozen else "fastcache.compile",
        )
        yield Contender("fastcache", method, how, call, attached, kept=OUR_KEPT[method])
    if not systems.missing("diffusers"):
        for other in _diffusers(subject, plan):
            if other.method in STACK_METHODS:
                other.compiled, other.call = "torch.compile", torch.compile(other.call)
                yield other
    if torch.cuda.is_available():
        for method in ("MagCache", "FirstBlock"):
            model = subject.twin()
            attached = systems.attach_fastcache(model, ours[method])
            call = fastcache.compile(model, mode="reduce-overhead")
            yield Contender("fastcache", method, "CUDA graphs", call, attached)


# --- measuring ------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    for package in ("diffusers", "cache-dit"):
        if reason := systems.missing(package):
            print(reason)
    if systems.missing("diffusers"):
        print("the models are diffusers' own classes: nothing can be measured")
        return 0
    if args.quick:
        args.batch, args.rounds, args.steps = [1], 1, 10
    environment = common.environment(args.device)
    rows = common.read_lines(args.json) if args.resume else []
    have = {(r["model"], r["batch"], bool(r["compiled"])) for r in rows}
    for batch in args.batch:
        subject = MODELS[args.model](batch, args.steps, args.tokens, args.device)
        if (subject.name, batch, args.mode == "compiled") in have:
            continue
        rows += [{**row, **environment} for row in measure(subject, args)]
        if args.json:
            common.write_lines(args.json, rows)
    show(rows)
    if args.plot:
        from .figures import save, steps_figure

        save(steps_figure(rows), args.plot)
    return 0


def measure(subject: Subject, args: Any) -> list[Row]:
    """Interleaved runs of every contender; per-step medians."""
    sync = torch.cuda.synchronize if args.device == "cuda" else idle
    found: list[Contender] = []
    start = time.perf_counter()

    def late(share: float) -> bool:
        return time.perf_counter() - start > share * args.budget

    blocks = type(getattr(subject.model, subject.lists[0])[0])
    # what is compiled cannot be timed from within, nor what is only launched
    apart = INSIDE(blocks) if (args.mode, args.device) == ("eager", "cpu") else nullcontext()
    with systems.quietly(), torch.no_grad(), apart:
        for contender in contenders(subject, args.mode):
            if contender.system != "uncached" and contender.method not in args.method:
                continue
            if late(0.7):
                print(f"out of time before {contender.system} {contender.method}")
                break
            try:
                if not contender.compiled and args.device == "cpu":
                    with common.Live() as live:
                        contender.run(subject, sync)
                    contender.peak = live.peak
                for _ in range(args.warmup):  # also where compilation happens
                    contender.run(subject, sync)
            except Exception as error:
                print(f"{contender.system} {contender.method} {contender.compiled}: {error}"[:300])
                continue
            contender.times.clear()
            found.append(contender)
        floors = {(c.kept, bool(c.compiled)): c for c in found if c.method in FLOORS.values()}
        with common.bar(args.rounds * len(found), f"{subject.name}, batch {subject.batch}") as bar:
            for index in range(args.rounds):
                if index and late(1.0):
                    break
                turn = index % len(found)  # so that no contender is always late in a round
                for contender in found[turn:] + found[:turn]:
                    bar.set_postfix_str(f"{contender.system} {contender.method}")
                    if floor := floors.get((contender.kept, bool(contender.compiled))):
                        contender.above(floor, subject, sync)
                    else:
                        contender.run(subject, sync)
                    bar.update()
        return [_row(contender, subject, args) for contender in found]


def _row(contender: Contender, subject: Subject, args: Any) -> Row:
    plan = own_plan(contender.method, len(subject.calls))
    cached = contender.attached is not None
    skips = cached or contender.force is not None
    by_kind: dict[bool, list[float]] = {True: [], False: []}
    for times in contender.times:
        for compute, t in zip(plan, times, strict=True):
            by_kind[compute or not skips].append(t)
    row: Row = {"bench": "steps", "model": subject.name, "batch": subject.batch}
    row |= {"system": contender.system, "method": contender.method}
    row |= {"compiled": contender.compiled, "steps": len(plan), "computed": sum(plan)}
    runs = [sum(times) for times in contender.times]
    row |= {f"run_{k}": v for k, v in common.quantiles(runs).items()}
    row |= {"rounds": len(runs), "runs": [round(t, 6) for t in runs]}
    row["computed_ms"] = 1e3 * common.quantiles(by_kind[True])["p50"]
    row["reused_ms"] = 1e3 * common.quantiles(by_kind[False])["p50"] if skips else None
    if contender.pairs:
        row |= {f"own_{k}": 1e3 * v for k, v in common.quantiles(contender.own()).items()}
        row["own_ms"] = row.pop("own_p50")
    if cached and not contender.compiled:
        row |= _traffic(contender, subject)
    if contender.peak is not None:
        row["peak_bytes"] = contender.peak
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.run(subject, torch.cuda.synchronize)
        contender.times.pop()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return row


def _traffic(contender: Contender, subject: Subject) -> Row:
    """Launches, device reads, new tensors and cache bytes, of the first reused step past the warm-up."""
    plan, attached = own_plan(contender.method, len(subject.calls)), contender.attached
    assert attached is not None
    row: Row = {}
    for i, inputs in enumerate(subject.calls):
        systems.CLOCK["t"] = t = timestep(i, len(plan))
        if contender.force is not None:
            contender.force(plan[i])
        watched = i > WARMUP and not plan[i]
        with (
            attached.context("cond", i, len(plan), t),
            common.Traffic(subject.hidden_bytes // 2) if watched else nullcontext() as traffic,
        ):
            contender.call(**inputs)
        if watched:
            # reading two sums with `tolist` is no op that a dispatch mode could see
            hidden = int(contender.system == "fastcache" and contender.method == "FirstBlock")
            row = {"launches": traffic.launches, "reads": traffic.reads + hidden}
            row |= {"temporaries": traffic.temporaries, "cache_bytes": attached.nbytes()}
            break
    attached.reset()
    return row


def show(rows: list[Row]) -> None:
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in rows):
        here = [r for r in rows if (r["model"], r["batch"]) == (model, batch)]
        table = [
            [r["method"], r["system"], r["compiled"]]
            + [_ms(r.get(k)) for k in ("computed_ms", "reused_ms", "own_ms")]
            + [common.spread({p: r[f"run_{p}"] for p in ("p20", "p50", "p80")}, 1e3, 1)]
            + [r.get("launches"), r.get("reads"), _kib(r.get("temporaries"))]
            + [_kib(r.get("cache_bytes")), _kib(r.get("peak_bytes"))]
            for r in sorted(here, key=lambda r: (r["compiled"], r["method"]))
        ]
        columns = ["method", "system", "compiled", "computed ms", "reused ms", "own ms"]
        columns += ["run ms p20/p50/p80", "launches", "reads", "new KiB", "cache KiB", "peak KiB"]
        common.print_table(f"{model}, batch {batch}", columns, table)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _kib(value: int | None) -> str:
    return "" if value is None else f"{value / 1024:.0f}"


def _parser() -> Any:
    p = common.parser("steps", __doc__)
    p.add_argument("--model", choices=MODELS, default="digits")
    p.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    p.add_argument("--tokens", type=int, default=1024, help="image tokens of the random models")
    p.add_argument("--steps", type=int, default=STEPS)
    p.add_argument("--method", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    p.add_argument("--warmup", type=int, default=2, help="runs of each before the rounds")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument(
        "--mode",
        choices=("eager", "compiled", "both"),
        default="eager",
        help="compiled: under Inductor, which takes minutes",
    )
    p.add_argument("--budget", type=float, default=3600.0, help="seconds per model and batch")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
