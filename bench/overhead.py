# SPDX-License-Identifier: Apache-2.0
"""Python cost of one step on 57 blocks that do next to nothing: what a cache adds when it skips.

    python -m bench overhead --json out.jsonl

The first block adds a constant and the others return their input, so all that is left is the cost of
calling them, of the hooks around them and of the cache's own bookkeeping. Then FLUX's own 57 blocks in
diffusers' class, of a width that takes no time: there a cache's own cost is a step less the same model
without its blocks, run the same way. Contenders are interleaved; read the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastcache

from . import common
from .common import Row
from .trivial import BLOCKS, model_class

STEPS = 10**6  # longer than any benchmark: every run stays inside its plan


MAG: dict[str, Any] = {  # reuses every step
    "threshold": 1e9,
    "max_skip_steps": STEPS,
    "retention_ratio": 0.0,
    "num_inference_steps": STEPS,
}


OURS, THEIRS = "MagCache, fastcache", "MagCache, diffusers"


BARE, BARE_COMPILED = "FLUX without blocks", "FLUX without blocks, torch.compile"


# one addition, as a reused step has one too
ALONE, ALONE_COMPILED = "first block alone", "first block alone, torch.compile"


class Want(NamedTuple):
    """A promise: the time of one case against another's, each less that of a floor where it has one."""

    claim: str
    ours: str
    theirs: str
    bound: float
    floors: tuple[str, str] | None = None


WANT = (
    Want("skipped step, MagCache, against diffusers' hooks", OURS, THEIRS, 1 / 5),
    Want("the same without a context", f"{OURS}, no context", THEIRS, 1 / 5),
    Want(
        "skipped step, FirstBlockCache, against diffusers' hooks",
        "FirstBlock, fastcache",
        "FirstBlock, diffusers",
        1.0,
    ),
    *(
        Want(
            f"own cost of a reused step of FLUX's 57 blocks, {how}, against diffusers' hooks, eager",
            f"FLUX, fastcache, {how}",
            "FLUX, diffusers",
            1 / 10,
            (BARE_COMPILED, BARE),
        )
        for how in ("compile(frozen=True)", "compile", "torch.compile")
    ),
    Want(
        "own cost of a reused step of 57 trivial blocks, compile(frozen=True), against diffusers' hooks, eager",
        f"{OURS}, compile(frozen=True)",
        THEIRS,
        1 / 10,
        (ALONE_COMPILED, ALONE),
    ),
    Want(
        "whole reuse step of 57 trivial blocks, fastcache.compile(frozen=True), against diffusers' hooks",
        f"{OURS}, compile(frozen=True)",
        THEIRS,
        1 / 10,
    ),
)


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
        _profile(cases[OURS][1])
    return 0


def show(rows: list[Row]) -> None:
    empty = rows[0]["p50"]
    table = [[r["case"], common.spread(r, 1e6, 1), f"{r['p50'] / empty:.2f}x"] for r in rows]
    columns = ["one step", "us p20 / p50 / p80", "of the uncached model"]
    common.print_table(f"{rows[0]['blocks']} blocks of next to no work", columns, table)
    for claim in claims(rows):
        verdict = "met" if claim["met"] else "NOT met"
        print(f"{claim['claim']}: {claim['value']:.3f} (at most {claim['bound']:.3f}) {verdict}")


def claims(rows: list[Row]) -> list[Row]:
    """The ratios that issue trackers ask about, with their bounds."""
    at = {r["case"]: r["p50"] for r in rows}
    found = []
    for want in WANT:
        needed = (want.ours, want.theirs, *(want.floors or ()))
        if not all(name in at for name in needed):
            continue
        ours, theirs, *floors = (at[name] for name in needed)
        below, above = floors or (0.0, 0.0)
        value = (ours - below) / (theirs - above)
        met = value <= want.bound
        found.append({"claim": want.claim, "value": value, "bound": want.bound, "met": met})
    return found


Case = tuple[str, tuple[str, Callable[[], object]]]


Inputs = tuple[tuple, dict[str, Tensor]]  # of a model: by place, by name


def _cases(blocks: int, backend: str) -> Iterator[Case]:
    """Every contender. backend: what torch.compile generates code with."""
    inputs: Inputs = ((torch.randn(1, 4, 8),), {})
    make = model_class()

    def fresh() -> Any:
        return make(blocks).eval()

    yield "uncached model", ("uncached", _calling(fresh(), inputs))
    mag = fastcache.MagCacheConfig(**MAG, mag_ratios=[1.0] * 2)
    first = fastcache.FirstBlockCacheConfig(threshold=1e9)
    taylor = fastcache.Recipe(fastcache.Mask((1, 1, 1, 1) + (0,) * 10**5), fastcache.Taylor(1))
    if hooks := _diffusers_hooks():
        for method, config in hooks.items():
            yield f"{method}, diffusers", ("diffusers", _hooked(fresh(), config, inputs))
    yield OURS, ("fastcache", _driven(fresh(), mag, inputs))
    yield f"{OURS}, no context", ("fastcache", _driven(fresh(), mag, inputs, context=False))
    yield "FirstBlock, fastcache", ("fastcache", _driven(fresh(), first, inputs))
    yield "Taylor order 1 on the stack, fastcache", ("fastcache", _driven(fresh(), taylor, inputs))
    for how in COMPILED:
        yield f"{OURS}, {how}", ("fastcache", _driven(fresh(), mag, inputs, how, backend))
    alone = torch.compile(fresh(), fullgraph=True, backend=backend)
    yield "uncached, torch.compile", ("compile", _calling(alone, inputs))
    yield ALONE, ("uncached", _calling(make(1).eval(), inputs))
    alone = torch.compile(make(1).eval(), fullgraph=True, backend=backend)
    yield ALONE_COMPILED, ("compile", _calling(alone, inputs))
    # what no compiled step can be cheaper than
    least = torch.compile(lambda x: x + 1, fullgraph=True, backend=backend)
    yield "one addition, torch.compile", ("compile", _calling(least, inputs))
    if hooks:
        yield from _flux_cases(blocks, hooks["MagCache"], mag, backend)


def _flux_cases(blocks: int, theirs: Any, ours: Any, backend: str) -> Iterator[Case]:
    """FLUX's blocks, two heads wide: of 57, 19 take text and image apart and 38 take them joined."""
    inputs: Inputs = ((), flux_inputs())

    def _flux(count: int) -> Any:
        return flux(count // 3, count - count // 3)

    yield BARE, ("uncached", _calling(_flux(0), inputs))
    yield "FLUX, diffusers", ("diffusers", _hooked(_flux(blocks), theirs, inputs))
    yield "FLUX, fastcache", ("fastcache", _driven(_flux(blocks), ours, inputs))
    for how in COMPILED:
        driven = _driven(_flux(blocks), ours, inputs, how, backend)
        yield f"FLUX, fastcache, {how}", ("fastcache", driven)
    alone = torch.compile(_flux(0), fullgraph=True, backend=backend)
    yield BARE_COMPILED, ("compile", _calling(alone, inputs))


def flux_inputs() -> dict[str, Tensor]:
    """Keyword arguments of one call of `flux`."""
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def flux(double: int, single: int) -> Any:
    """FLUX two heads wide, with so many blocks that take text and image apart, and joined."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


COMPILED: dict[str, Callable[[nn.Module, str], Any]] = {
    "compile": lambda model, backend: fastcache.compile(model, backend=backend),
    "compile(frozen=True)": lambda model, backend: fastcache.compile(
        model, frozen=True, backend=backend
    ),
    "torch.compile": lambda model, backend: torch.compile(model, fullgraph=True, backend=backend),
}


def _calling(model: Callable, inputs: Inputs) -> Callable[[], object]:
    args, kwargs = inputs
    return lambda: model(*args, **kwargs)


def _driven(
    model: nn.Module,
    config: Any,
    inputs: Inputs,
    how: str = "",
    backend: str = "inductor",
    context: bool = True,
) -> Callable[[], object]:
    """Steps of one endless run; all but the first few are skipped."""
    cache = fastcache.enable(model, config)
    args, kwargs = inputs
    call = COMPILED[how](model, backend) if how else model

    def run() -> object:
        if not context:
            return call(*args, **kwargs)
        with cache.context("cond"):
            return call(*args, **kwargs)

    return run


def _hooked(model: Any, config: Any, inputs: Inputs) -> Callable[[], object]:
    """The same under diffusers' own hooks."""
    model.enable_cache(config)
    args, kwargs = inputs

    def run() -> object:
        with model.cache_context("cond"):
            return model(*args, **kwargs)

    return run


def _diffusers_hooks() -> dict[str, Any]:
    """Its configs by method; none where it is not installed."""
    try:
        from diffusers import FirstBlockCacheConfig
        from diffusers.hooks import MagCacheConfig
    except ImportError:
        print("diffusers is not installed: its hooks are left out")
        return {}
    return {
        "MagCache": MagCacheConfig(**MAG, mag_ratios=torch.ones(STEPS)),
        "FirstBlock": FirstBlockCacheConfig(threshold=1e9),
    }


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
