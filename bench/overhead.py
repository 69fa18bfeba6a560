"""Python cost of one step on 57 blocks that do next to nothing: what a cache adds when it skips.

    python -m bench overhead --json out.jsonl

The first block adds a constant and the others return their input, so all that is left is the cost of
calling them, of the hooks around them and of the cache's own bookkeeping. Contenders are interleaved;
read the ratios.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastcache

from . import common
from .common import Row

BLOCKS = 57  # FLUX: 19 double and 38 single blocks
STEPS = 10**6  # longer than any benchmark: every run stays inside its plan

OURS, THEIRS = "MagCache, fastcache", "MagCache, diffusers"
WANT = (  # claim, numerator, denominator, bound
    ("skipped step, MagCache, against diffusers' hooks", OURS, THEIRS, 1 / 5),
    ("the same without a context", f"{OURS}, no context", THEIRS, 1 / 5),
    (
        "skipped step, FirstBlockCache, against diffusers' hooks",
        "FirstBlock, fastcache",
        "FirstBlock, diffusers",
        1.0,
    ),
    (
        "reuse step of fastcache.compile against diffusers' hooks, eager",
        f"{OURS}.compile",
        THEIRS,
        1 / 10,
    ),
    (
        "reuse step in torch.compile(model) against diffusers' hooks, eager",
        f"{OURS}, torch.compile",
        THEIRS,
        1 / 10,
    ),
)


class Block(nn.Module):
    """Returns what it is given."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Head(Block):
    """The first one does a little, or FirstBlockCache would compare nothing with nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.5


def model_class() -> type[nn.Module]:
    """A model of trivial blocks; with diffusers installed one that its hooks accept."""
    bases: tuple[type, ...] = (nn.Module,)
    with contextlib.suppress(ImportError):
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
        from diffusers.models.cache_utils import CacheMixin

        for kind in (Block, Head):
            row = TransformerBlockMetadata(
                return_hidden_states_index=0, return_encoder_hidden_states_index=None
            )
            TransformerBlockRegistry.register(kind, row)
        bases = (nn.Module, CacheMixin)

    def init(self: Any, blocks: int) -> None:
        nn.Module.__init__(self)
        self.transformer_blocks = nn.ModuleList([Head(), *(Block() for _ in range(blocks - 1))])

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    return type("TrivialModel", bases, {"__init__": init, "forward": forward})


def main(argv: list[str] | None = None) -> int:
    p = common.parser("overhead", __doc__)
    p.add_argument("--rounds", type=int, help="timed rounds")
    p.add_argument("--profile", action="store_true", help="print where our Python time goes")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    blocks = 5 if args.quick else BLOCKS
    rounds, repeat = args.rounds or (3 if args.quick else 60), 3 if args.quick else 20
    cases = dict(_cases(blocks, "eager" if args.quick else "inductor"))
    environment = common.environment()
    with common.bar(rounds, "overhead") as progress, torch.no_grad():
        runs = {name: run for name, (_, run) in cases.items()}
        # enough calls to record, to compile every mode and to be past the first steps
        samples = common.interleaved(runs, rounds, repeat=repeat, warmup=12, tick=progress.update)
    rows = [
        {"bench": "overhead", "case": name, "system": cases[name][0], "blocks": blocks}
        | common.quantiles(times)
        | {"rounds": rounds, "calls": repeat}
        | environment
        for name, times in samples.items()
    ]
    show(rows)
    if args.json:
        common.write_lines(args.json, rows)
    if args.plot:
        from .figures import overhead_figure, save

        save(overhead_figure(rows), args.plot)
    if args.profile:
        _profile(cases["MagCache, fastcache"][1])
    return 0


def show(rows: list[Row]) -> None:
    empty = rows[0]["p50"]
    table = [[r["case"], common.spread(r, 1e6, 1), f"{r['p50'] / empty:.2f}x"] for r in rows]
    columns = ["one step", "us p20 / p50 / p80", "of plain calls"]
    common.print_table(f"{rows[0]['blocks']} trivial blocks", columns, table)
    for claim in claims(rows):
        verdict = "met" if claim["met"] else "NOT met"
        print(f"{claim['claim']}: {claim['value']:.3f} (at most {claim['bound']:.3f}) {verdict}")


def claims(rows: list[Row]) -> list[Row]:
    """The ratios that issue trackers ask about, with their bounds."""
    at = {r["case"]: r["p50"] for r in rows}
    found = []
    for name, ours, theirs, bound in WANT:
        if ours in at and theirs in at:
            value = at[ours] / at[theirs]
            found.append({"claim": name, "value": value, "bound": bound, "met": value <= bound})
    return found


Case = tuple[str, tuple[str, Callable[[], object]]]


def _cases(blocks: int, backend: str) -> Iterator[Case]:
    """Every contender. backend: what torch.compile generates code with."""
    x = torch.randn(1, 4, 8)
    make = model_class()

    def fresh() -> Any:
        return make(blocks).eval()

    plain = fresh()
    yield "uncached model", ("uncached", lambda: plain(x))
    yield from _diffusers_cases(fresh, x)
    mag = fastcache.MagCacheConfig(
        threshold=1e9,
        max_skip_steps=STEPS,
        retention_ratio=0.0,
        num_inference_steps=STEPS,
        mag_ratios=[1.0] * 2,
    )
    yield "MagCache, fastcache", ("fastcache", _driven(fresh(), mag, x))
    yield "MagCache, fastcache, no context", ("fastcache", _driven(fresh(), mag, x, context=False))
    first = fastcache.FirstBlockCacheConfig(threshold=1e9)
    yield "FirstBlock, fastcache", ("fastcache", _driven(fresh(), first, x))
    taylor = fastcache.Recipe(fastcache.Mask((1, 1, 1, 1) + (0,) * 10**5), fastcache.Taylor(1))
    yield "Taylor order 1 on the stack, fastcache", ("fastcache", _driven(fresh(), taylor, x))
    yield "MagCache, fastcache.compile", ("fastcache", _driven(fresh(), mag, x, "ours", backend))
    yield (
        "MagCache, fastcache, torch.compile",
        ("fastcache", _driven(fresh(), mag, x, "theirs", backend)),
    )
    alone = torch.compile(fresh(), fullgraph=True, backend=backend)
    yield "uncached, torch.compile", ("compile", lambda: alone(x))
    # what no compiled step can be cheaper than
    least = torch.compile(lambda x: x + 1, fullgraph=True, backend=backend)
    yield "one addition, torch.compile", ("compile", lambda: least(x))


def _driven(
    model: nn.Module,
    config: Any,
    x: Tensor,
    how: str = "eager",
    backend: str = "inductor",
    context: bool = True,
) -> Callable[[], object]:
    """Steps of one endless run; all but the first few are skipped."""
    cache = fastcache.enable(model, config)
    call: Any = {
        "eager": lambda: model,
        "ours": lambda: fastcache.compile(model, backend=backend),
        "theirs": lambda: torch.compile(model, fullgraph=True, backend=backend),
    }[how]()

    def run() -> object:
        if not context:
            return call(x)
        with cache.context("cond"):
            return call(x)

    return run


def _diffusers_cases(fresh: Callable[[], Any], x: Tensor) -> Iterator[Case]:
    try:
        from diffusers import FirstBlockCacheConfig
        from diffusers.hooks import MagCacheConfig
    except ImportError:
        print("diffusers is not installed: its hooks are left out")
        return
    mag = MagCacheConfig(
        threshold=1e9,
        max_skip_steps=STEPS,
        retention_ratio=0.0,
        num_inference_steps=STEPS,
        mag_ratios=torch.ones(STEPS),
    )
    for name, config in (
        ("MagCache, diffusers", mag),
        ("FirstBlock, diffusers", FirstBlockCacheConfig(threshold=1e9)),
    ):
        model = fresh()
        model.enable_cache(config)

        def run(model: Any = model) -> object:
            with model.cache_context("cond"):
                return model(x)

        yield name, ("diffusers", run)


def _profile(run: Callable[[], object], calls: int = 5000) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    with torch.no_grad():
        profile.enable()
        for _ in range(calls):
            run()
        profile.disable()
    stats = pstats.Stats(profile)
    stats.sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    raise SystemExit(main())
