# SPDX-License-Identifier: Apache-2.0
"""What caching does to torch.compile, on tiny models of diffusers' classes and on a user's own.

    python -m bench graphs --json out.jsonl

Three runs of 50 steps, two contexts a step, captured without a code generator; every output is compared
with the same method in eager. "fullgraph" says at which step `fullgraph=True` fails; the counts are then
taken without it. "from the cache" counts the calls of a run whose output is not the uncached model's.
With `--backend inductor` ours and the uncached model under Inductor, which takes an hour.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch._dynamo import utils

import fastcache

from . import common, systems
from .common import Row
from .graph_models import MODELS, RUNS, Runs

METHODS = ("FirstBlockCache", "MagCache", "TaylorSeer", "PAB", "FasterCache")


CONTEXTS = ("cond", "uncond")


STEPS = 50
OURS = "fastcache.compile(model)"


NUMBERS = {"difference": ".0e", "eager_ms": ".2f", "compiled_ms": ".2f", "seconds": ".1f"}


class Subject:
    """A tiny model and the calls of one run. factors: what TaylorSeer keeps its factors in."""

    def __init__(self, name: str, steps: int, factors: torch.dtype) -> None:
        self.name, self.steps, self.factors = name, steps, factors
        make, self.threshold = MODELS[name]
        self.model, self.calls = make(name, steps)
        self.unit = float(self.calls[0]["timestep"].max()) / 1000
        names = [n for n, m in self.model.named_modules() if type(m).__name__.endswith("Attention")]
        # diffusers' default patterns match no attention where it is not called `attn`
        full = any(n.endswith(".attn") for n in names)
        self.attn = None if full else [r".*\.attn1$"] if names else None
        self.uncached = Runs()
        self.run(self.uncached, nothing(self.model), self.model, runs=1)

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def run(
        self,
        into: Runs,
        attached: systems.Attached,
        call: Callable[..., Any],
        count: Callable[[], int] = int,
        runs: int = RUNS,
    ) -> Runs:
        """A step is told apart by `CLOCK` as well as by its context."""
        now = common.clock()
        for _ in range(runs):
            for i, inputs in enumerate(self.calls):
                t = float(inputs["timestep"].reshape(-1)[0])
                systems.CLOCK["t"] = t
                for name, scale in zip(CONTEXTS, (1.0, 0.5), strict=True):
                    text = inputs["encoder_hidden_states"] * scale
                    given = {**inputs, "encoder_hidden_states": text}
                    start = now()
                    with attached.context(name, i, self.steps, t), torch.no_grad():
                        out = call(**given)
                    into.seconds.append(now() - start)
                    into.outputs.append((out if isinstance(out, Tensor) else out[0]).clone())
                    into.graphs.append(count())
            attached.reset()
        return into


Attach = Callable[[nn.Module], systems.Attached]


Compile = Callable[[nn.Module, Any, bool], Any]


class Graphs:
    """A backend that counts graphs and runs them as they are, or as Inductor makes them."""

    def __init__(self, backend: str) -> None:
        self.backend, self.count = backend, 0

    def __call__(self, module: Any, example_inputs: Any) -> Callable[..., Any]:
        self.count += 1
        if self.backend == "capture":
            return module.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, example_inputs)


def now_in(low: float, high: float, unit: float) -> Row:
    """The timesteps at which attention may be reused, as both libraries name them."""
    return {
        "spatial_attention_timestep_skip_range": (low * unit, high * unit),
        "current_timestep_callback": systems.now,
    }


# Captured graphs give the bits of the default. Under Inductor a factor in bfloat16 that rounds the other way is
# further off than compiling ever is.
FACTORS = {"capture": torch.bfloat16, "inductor": torch.float32}


# from either library, which have the same names: (library, subject) -> config
CONFIGS: dict[str, Callable[[Any, Subject], Any]] = {
    "FirstBlockCache": lambda library, s: library.FirstBlockCacheConfig(s.threshold),
    "MagCache": lambda library, s: library.MagCacheConfig(
        mag_ratios=torch.ones(s.steps), num_inference_steps=s.steps
    ),
    "TaylorSeer": lambda library, s: library.TaylorSeerCacheConfig(
        cache_interval=3, cache_identifiers=s.attn, taylor_factors_dtype=s.factors
    ),
    "PAB": lambda library, s: library.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, **now_in(100, 800, s.unit)
    ),
    "FasterCache": lambda library, s: library.FasterCacheConfig(
        is_guidance_distilled=True, **now_in(-1, 681, s.unit)
    ),
}


def nothing(model: nn.Module) -> systems.Attached:
    """No cache."""
    null = contextlib.nullcontext()
    return systems.Attached(lambda *a: null, lambda: None, lambda: None, lambda: None)


def whole(model: nn.Module, backend: Any, fullgraph: bool) -> Any:
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


def ours(model: nn.Module, backend: Any, fullgraph: bool) -> Any:
    return fastcache.compile(model, backend=backend, fullgraph=fullgraph)


def contenders(
    subject: Subject, method: str, backend: str
) -> Iterator[tuple[str, str, Attach, Compile]]:
    """System, what compiles it, how it is attached and compiled."""
    if method == "uncached":
        yield "uncached", "torch.compile(model)", nothing, whole
        return
    make = CONFIGS[method]

    def mine(model: nn.Module) -> systems.Attached:
        return systems.attach_fastcache(model, make(fastcache, subject))

    def theirs(model: nn.Module) -> systems.Attached:
        from diffusers import hooks

        return systems.attach_diffusers(model, make(hooks, subject))

    def dbcache(model: nn.Module) -> systems.Attached:
        order = 1 if method == "TaylorSeer" else 0
        mask = [int(i < 4 or i % 3 == 0) for i in range(subject.steps)]
        return systems.attach_cache_dit(
            model, order=order, steps=subject.steps, mask=mask, separate_cfg=True
        )

    yield "fastcache", OURS, mine, ours
    if backend == "inductor":  # takes too long for graphs by the dozen
        return
    if (
        method != "FirstBlockCache"
    ):  # refused under the user's own compile, by an error that says so
        yield "fastcache", "torch.compile(model)", mine, whole
    yield "diffusers", "torch.compile(model)", theirs, whole
    if method in ("FirstBlockCache", "TaylorSeer") and not systems.missing("cache-dit"):
        yield "cache-dit", "torch.compile(model)", dbcache, whole


def main(argv: list[str] | None = None) -> int:
    p = common.parser("graphs", __doc__)
    p.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--backend", choices=("capture", "inductor"), default="capture")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    steps = 10 if args.quick else STEPS
    models = ["Wan3D", "plain"] if args.quick else args.model
    methods = ["MagCache"] if args.quick else args.method
    for package in ("diffusers", "cache-dit"):
        if reason := systems.missing(package):
            print(reason)
            if package == "diffusers":
                print("the tiny models are diffusers' own classes: nothing can be measured")
                return 0
    utils.set_compilation_metrics_limit(100_000)
    environment = common.environment()
    rows = common.read_lines(args.json) if args.resume else []
    have = {(r["model"], r["method"]) for r in rows if r["backend"] == args.backend}
    work = [(m, method) for m in models for method in ("uncached", *methods)]
    work = [w for w in work if w not in have]
    with common.bar(len(work), "graphs") as progress, systems.quietly():
        subject = None
        for name, method in work:
            progress.set_postfix_str(f"{name} {method}")
            if subject is None or subject.name != name:
                subject = Subject(name, steps, FACTORS[args.backend])
            for contender in contenders(subject, method, args.backend):
                row = {"bench": "graphs", "model": name, "method": method, "steps": steps}
                row |= {"system": contender[0], "entry": contender[1], "backend": args.backend}
                row |= measure(subject, *contender[2:], args.backend)
                rows.append({**row, **environment})
            progress.update()
            if args.json:
                common.write_lines(args.json, rows)
    show(rows)
    return 0


def measure(subject: Subject, attach: Attach, compiled: Compile, backend: str) -> Row:
    """Counts, the difference to eager, seconds, and whether fullgraph=True survives."""
    row: Row = {"runs": RUNS, "fullgraph": "no"}
    try:
        model = subject.fresh()
        eager = subject.run(Runs(), attach(model), model)
        plain = zip(eager.outputs, subject.uncached.outputs, strict=False)
        row["calls"] = len(subject.uncached.outputs)
        row["from_cache"] = sum(not torch.equal(a, b) for a, b in plain)
        if attach is not nothing and not row["from_cache"]:
            raise RuntimeError("nothing comes from the cache")
        runs, row["fullgraph"], start = Runs(), "yes", time.perf_counter()
        try:
            counts = compiled_runs(runs, subject, attach, compiled, backend, True)
        except Exception as error:
            step = len(runs.outputs) // len(CONTEXTS)
            row["fullgraph"] = f"fails at step {step}: {_brief(error)}"
            runs, start = Runs(), time.perf_counter()
            counts = compiled_runs(runs, subject, attach, compiled, backend, False)
        row |= counts | {"difference": runs.difference(eager)}
        row["eager_ms"] = 1e3 * eager.steady() / row["calls"]
        row["compiled_ms"] = 1e3 * runs.steady() / row["calls"]
        # a C++ compiler is another process, which the clock of this thread does not see
        wall = time.perf_counter() - start
        row["seconds"] = (
            wall if backend == "inductor" else sum(runs.seconds)
        ) - RUNS * runs.steady()
    except Exception as error:  # a peer that cannot run at all is a result too
        row["error"] = _brief(error)
    return row


def compiled_runs(
    runs: Runs, subject: Subject, attach: Attach, compiled: Compile, backend: str, fullgraph: bool
) -> Row:
    """Compiled runs, and how many graphs they took."""
    dynamo.reset()
    utils.counters.clear()
    utils.clear_compilation_metrics()
    graphs, model = Graphs(backend), subject.fresh()
    attached = attach(model)
    try:
        subject.run(runs, attached, compiled(model, graphs, fullgraph), lambda: graphs.count)
    finally:
        attached.detach()
    again = sum(bool(m.recompile_reason) for m in utils.get_compilation_metrics())
    return {
        "graphs": graphs.count,
        "breaks": sum(utils.counters["graph_break"].values()),
        "recompiles": again,  # compilations of code that had a graph already
        "last_new_graph": runs.graphs.index(graphs.count),
    }


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:140]


def show(rows: list[Row]) -> None:
    table: list[list[object]] = []
    for row in rows:
        if table and row["model"] != table[-1][0]:
            table.append([])
        counts = [row.get(k) for k in ("graphs", "breaks", "recompiles", "last_new_graph")]
        shown = [format(row[k], form) if k in row else "" for k, form in NUMBERS.items()]
        verdict = row.get("error", row["fullgraph"])[:18]
        entry = row["entry"].split("(")[0] + (", Inductor" if row["backend"] == "inductor" else "")
        table.append([row["model"], row["method"], row["system"], entry, *counts, verdict, *shown])
    columns = ["model", "method", "system", "compiled by", "graphs", "breaks", "again"]
    columns += ["last at", "fullgraph", "to eager", "eager ms", "compiled ms", "compile s"]
    common.print_table("torch.compile", columns, table)


if __name__ == "__main__":
    raise SystemExit(main())
