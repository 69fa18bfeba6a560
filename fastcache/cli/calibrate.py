# SPDX-License-Identifier: Apache-2.0
"""`fastcache calibrate`: measure the demo model or a run of your own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration
    from ..recipe import Recipe


def _calibrate(options: argparse.Namespace) -> int:
    import torch

    from ..tools.measure import calibrate
    from .parse import DEMO, made_by

    torch.set_num_threads(options.threads)
    target, run = (
        _demo_run(options) if options.model == DEMO else made_by("calibrate", options.model, "run")
    )
    calibration = calibrate(
        run,
        target,
        num_inference_steps=options.steps if options.model == DEMO else None,
        source=f"fastcache calibrate {options.model}",
        progress=not options.quiet,
    )
    print(calibration)
    print(f"calibration: {calibration.save(options.out)}")
    picture = options.picture or options.out.with_suffix(".png")
    try:
        print(f"picture: {calibration.plot(picture)}")
    except ImportError as error:
        print(f"no picture: {error}")
    picks = _picks(calibration, _blocks(target), options.speedup)
    if options.plan:
        picks.append(_plan(calibration, options))
    if options.check and picks:
        _check(picks, target, run)
    return 0


def _demo_run(options: argparse.Namespace) -> tuple[Any, Callable[..., Any]]:
    import torch

    from ..demo.model import load_model
    from ..demo.sample import generate

    model, labels = load_model(), torch.arange(options.batch) % 10

    def run(cache: Any) -> Any:
        return generate(
            model,
            labels,
            steps=options.steps,
            seed=options.seed,
            guidance=options.guidance,
            cache=cache,
        )

    return model, run


def _blocks(target: Any) -> int:
    """Blocks of the first denoiser: FirstBlockCache runs one of them on every step."""
    from ..models.attention import block_lists
    from ..models.pipeline import denoisers_of
    from ..models.registry import adapter_for

    model = denoisers_of(target)[0][1]
    return sum(len(blocks) for _, blocks in block_lists(model, adapter_for(model)))


def _picks(calibration: Calibration, blocks: int, speedup: float) -> list[tuple[str, Recipe]]:
    """Print the thresholds that compute what a speed-up leaves; returns them as recipes."""
    from .. import FirstBlock, Magnitude, Recipe, Taylor

    print(f"\nfor a run {speedup:g} times as fast, if the blocks are all of its cost:")
    picks = []
    share = (1 / speedup - 1 / blocks) / (1 - 1 / blocks)
    guards: dict[str, Any] = {"warmup": 4, "last": True}
    try:
        threshold = calibration.first_block_threshold(share, **guards)
        text = f"Recipe(FirstBlock({threshold:g}), Taylor(order=1))"
        picks.append((text, Recipe(FirstBlock(threshold), Taylor(order=1))))
        print(
            f"  {text}  computes {calibration.first_block_share(threshold, **guards):.0%} of steps"
        )
    except ValueError as error:
        print(f"  FirstBlock: {error}")
    fields: dict[str, Any] = {"max_skip_steps": 5, "retention_ratio": 0.15}
    try:
        threshold = calibration.mag_threshold(1 / speedup, **fields)
        steps, ratios = calibration.steps, calibration.mag_ratios
        when = Magnitude(threshold, num_inference_steps=steps, mag_ratios=ratios, **fields)
        named = ", ".join(f"{k}={v}" for k, v in fields.items())
        text = f"calibration.config(threshold={threshold:g}, {named})"
        picks.append((text, Recipe(when)))
        print(f"  {text}  computes {calibration.mag_share(threshold, **fields):.0%} of steps")
    except ValueError as error:
        print(f"  MagCache: {error}")
    if calibration.input_changes:
        print(f"  TeaCache: calibration.tea_cache(threshold=...), {calibration.input_fit()}")
    return picks


def _plan(calibration: Calibration, options: argparse.Namespace) -> tuple[str, Recipe]:
    """Print and save the plan of so many computed steps; returns it as a pick."""
    recipe = calibration.plan(options.plan, cost=options.cost)
    print(f"\nplanned for {options.plan} computed steps:")
    print(recipe.plan(calibration.steps))
    path = options.plan_out or options.out.with_name("plan.json")
    print(f"plan: {recipe.save(path)}, which fastcache.enable takes")
    return f"plan of {options.plan}", recipe


def _check(picks: list[tuple[str, Recipe]], target: Any, run: Callable[..., Any]) -> None:
    """Run once with and once without each pick, and say what it came to."""
    from .. import Mask, Recipe, enable
    from ..tools.measure import generate_with

    print("\nchecked, one run each:")
    uncached = 0.0
    # an all-compute mask stands for the uncached run, since `run` wants a cache to drive
    for text, recipe in [("uncached", Recipe(Mask((True,)))), *picks]:
        with enable(target, recipe) as cache:
            start = time.perf_counter()
            generate_with(run, cache)
            seconds = time.perf_counter() - start
            uncached = uncached or seconds
            done = f"{cache.stats.computed} of {len(cache.stats)} calls computed"
        print(f"  {text}: {done}, {seconds:.2f} s, {uncached / seconds:.2f} times as fast")


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        help="demo, or module:callable that returns (target, run), run(cache) being one generation",
    )
    parser.add_argument("--out", type=Path, default=Path("calibration.json"))
    parser.add_argument("--picture", type=Path, help="beside the JSON file if not given")
    parser.add_argument("--speedup", type=_speedup, default=2.0, help="target, larger than 1")
    parser.add_argument(
        "--plan", type=int, metavar="K", help="also plan which K steps of a run to compute"
    )
    parser.add_argument(
        "--plan-out", type=Path, help="plan.json beside the calibration if not given"
    )
    parser.add_argument(
        "--cost", choices=("steps", "final", "run"), default="steps", help="what a plan keeps small"
    )
    parser.add_argument("--steps", type=int, default=28, help="of the demo model")
    parser.add_argument("--batch", type=int, default=8, help="images of the demo model")
    parser.add_argument("--seed", type=int, default=1234, help="of the demo model's noise")
    parser.add_argument("--guidance", type=float, help="scale for the demo model; none by default")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not try the picks"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    parser.set_defaults(run=_calibrate)


def _speedup(text: str) -> float:
    value = float(text)
    if not 1 < value < 100:
        raise argparse.ArgumentTypeError("must be larger than 1")
    return value
