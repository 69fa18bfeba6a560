"""What caching does to torch.compile: graphs, breaks, recompiles, on tiny models of diffusers' own classes.

    python -m bench graphs --json out.jsonl

Two contexts a step, two runs, captured without a code generator; every output is compared with the same
method in eager. "fullgraph" says at which step `torch.compile(model, fullgraph=True)` fails.
"""

from __future__ import annotations

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
from .common import ROOT, Row

MODELS = ("Flux", "Wan3D", "CogVideoX", "LTX", "QwenImage")
METHODS = ("FirstBlockCache", "MagCache", "TaylorSeer", "PAB", "FasterCache")
CONTEXTS = ("cond", "uncond")
SEVERAL = 4  # graphs that a method with several timestep ranges may take


class Graphs:
    """A backend that captures graphs, counts them and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: Any, example_inputs: Any) -> Callable[..., Any]:
        self.count += 1
        return module.forward


def config(library: Any, method: str, unit: float, steps: int, attn: list[str] | None) -> Any:
    """The config of a method, from either library; both have the same names."""
    if method == "FirstBlockCache":
        return library.FirstBlockCacheConfig(threshold=0.3)
    if method == "MagCache":
        return library.MagCacheConfig(mag_ratios=torch.ones(steps), num_inference_steps=steps)
    if method == "TaylorSeer":
        return library.TaylorSeerCacheConfig(cache_interval=3, cache_identifiers=attn)
    if method == "PAB":
        return library.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100 * unit, 800 * unit),
            current_timestep_callback=systems.now,
        )
    return library.FasterCacheConfig(
        is_guidance_distilled=True,
        spatial_attention_timestep_skip_range=(-1 * unit, 681 * unit),
        current_timestep_callback=systems.now,
    )


class Subject:
    """A tiny model and the calls of one run."""

    def __init__(self, name: str, steps: int) -> None:
        self.tiny = common.load_file("tiny", ROOT / "tests" / "tiny.py")
        self.name, self.steps = name, steps
        self.model, inputs = self.tiny.build(name)
        self.calls = self.tiny.trajectory(name, inputs, steps)
        self.unit = 1e-3 if name in self.tiny.UNIT_TIMESTEPS else 1.0
        names = [n for n, m in self.model.named_modules() if type(m).__name__.endswith("Attention")]
        # diffusers' default patterns match no attention where it is not called `attn`
        full = any(n.endswith(".attn") for n in names)
        self.attn = None if full else [r".*\.attn1$"] if names else None

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def run(
        self, attached: systems.Attached, call: Callable[..., Any], runs: int = 2
    ) -> Iterator[Tensor]:
        """Outputs in order; a step is told apart by `CLOCK` as well as by its context."""
        for _ in range(runs):
            for i, inputs in enumerate(self.calls):
                t = float(inputs["timestep"].reshape(-1)[0])
                systems.CLOCK["t"] = t
                for name, scale in zip(CONTEXTS, (1.0, 0.5), strict=True):
                    text = inputs["encoder_hidden_states"] * scale
                    given = {**inputs, "encoder_hidden_states": text}
                    with attached.context(name, i, self.steps, t), torch.no_grad():
                        out = call(**given, return_dict=False)
                    yield (out if isinstance(out, Tensor) else out[0]).clone()
            attached.reset()


def main(argv: list[str] | None = None) -> int:
    p = common.parser("graphs", __doc__)
    p.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    steps = 6 if args.quick else 12
    models = ["Wan3D"] if args.quick else args.model
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
    have = {(r["model"], r["method"]) for r in rows}
    work = [(m, method) for m in models for method in ("uncached", *methods)]
    work = [w for w in work if w not in have]
    with common.bar(len(work), "graphs") as progress, systems.quietly():
        subject = None
        for name, method in work:
            progress.set_postfix_str(f"{name} {method}")
            if subject is None or subject.name != name:
                subject = Subject(name, steps)
            for row in measure(subject, method):
                head = {"bench": "graphs", "model": name, "method": method, "steps": steps}
                rows.append({**head, **row, **environment})
            progress.update()
            if args.json:
                common.write_lines(args.json, rows)
    show(rows)
    return 0


def measure(subject: Subject, method: str) -> Iterator[Row]:
    if method == "uncached":
        none = systems.Attached(
            lambda *a: systems.contextlib.nullcontext(), lambda: None, lambda: None, lambda: None
        )
        yield _one("uncached", "torch.compile(model)", subject, lambda m: none, _whole)
        return
    made = [subject.unit, subject.steps, subject.attn]

    def ours(model: nn.Module) -> systems.Attached:
        return systems.attach_fastcache(model, config(fastcache, method, *made))

    def theirs(model: nn.Module) -> systems.Attached:
        from diffusers import hooks

        return systems.attach_diffusers(model, config(hooks, method, *made))

    yield _one("fastcache", "fastcache.compile(model)", subject, ours, _ours)
    if (
        method != "FirstBlockCache"
    ):  # refused under the user's own compile, by an error that says so
        yield _one("fastcache", "torch.compile(model)", subject, ours, _whole)
    yield _one("diffusers", "torch.compile(model)", subject, theirs, _whole)
    if systems.missing("cache-dit") or method not in ("FirstBlockCache", "TaylorSeer"):
        return

    def dbcache(model: nn.Module) -> systems.Attached:
        order = 1 if method == "TaylorSeer" else 0
        mask = [int(i < 4 or i % 3 == 0) for i in range(subject.steps)]
        return systems.attach_cache_dit(model, order=order, steps=subject.steps, mask=mask)

    yield _one("cache-dit", "torch.compile(model)", subject, dbcache, _whole)


def _whole(model: nn.Module, backend: Any, fullgraph: bool) -> Any:
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


def _ours(model: nn.Module, backend: Any, fullgraph: bool) -> Any:
    return fastcache.compile(model, backend=backend, fullgraph=fullgraph)


def _one(
    system: str,
    entry: str,
    subject: Subject,
    attach: Callable[[nn.Module], systems.Attached],
    compiled: Callable[[nn.Module, Any, bool], Any],
) -> Row:
    """Counts over two runs, the difference to eager, and whether fullgraph=True survives."""
    row: Row = {"system": system, "entry": entry}
    try:
        model = subject.fresh()
        attached = attach(model)
        expected = list(subject.run(attached, model))
        attached.detach()
        graphs, model = Graphs(), subject.fresh()
        _forget()
        attached = attach(model)
        call, outputs, last = compiled(model, graphs, False), [], 0
        start = time.perf_counter()
        for i, out in enumerate(subject.run(attached, call)):
            before = row.get("graphs", 0)
            row["graphs"] = graphs.count
            last = i if graphs.count > before else last
            outputs.append(out)
        attached.detach()
        row |= {"breaks": sum(utils.counters["graph_break"].values())}
        row |= {"recompiles": _recompiles(), "last_new_graph": last, "calls": len(outputs)}
        row |= {"capture_seconds": time.perf_counter() - start}
        pairs = zip(outputs, expected, strict=True)
        row["difference"] = max((a - b).abs().max().item() for a, b in pairs)
    except Exception as error:  # a peer that cannot run at all is a result too
        row["error"] = _brief(error)
    row["fullgraph"] = _fullgraph(subject, attach, compiled)
    return row


def _fullgraph(
    subject: Subject,
    attach: Callable[[nn.Module], systems.Attached],
    compiled: Callable[[nn.Module, Any, bool], Any],
) -> str:
    """ "yes", or where it fails and why."""
    _forget()
    done = 0
    try:
        model = subject.fresh()
        attached = attach(model)
        call = compiled(model, Graphs(), True)
        for _ in subject.run(attached, call, runs=1):
            done += 1
        attached.detach()
    except Exception as error:
        return f"fails at step {done // len(CONTEXTS)}: {_brief(error)}"
    return "yes"


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:140]


def _forget() -> None:
    dynamo.reset()
    utils.counters.clear()
    utils.clear_compilation_metrics()


def _recompiles() -> int:
    """Compilations of code that had a graph already."""
    return sum(bool(m.recompile_reason) for m in utils.get_compilation_metrics())


def show(rows: list[Row]) -> None:
    table: list[list[object]] = []
    for row in rows:
        if table and row["model"] != table[-1][0]:
            table.append([])
        counts = [row.get(k, "-") for k in ("graphs", "breaks", "recompiles", "last_new_graph")]
        difference = row.get("difference")
        equal = row.get("error", "-") if difference is None else f"{difference:.0e}"
        full = row["fullgraph"].split(":")[0]
        line = [row["model"], row["method"], row["system"], row["entry"], *counts, full, equal[:40]]
        table.append(line)
    columns = ["model", "method", "system", "compiled by", "graphs", "breaks", "recompiles"]
    common.print_table(
        "torch.compile", [*columns, "last new at call", "fullgraph", "against eager"], table
    )


if __name__ == "__main__":
    raise SystemExit(main())
