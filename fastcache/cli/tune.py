# SPDX-License-Identifier: Apache-2.0
"""`fastcache tune`: the best recipe for the demo model or a generation of your own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEMO_SPEEDUP = 2.0


def _tune(options: argparse.Namespace) -> int:
    import torch

    from ..tuning.tune import tune
    from .parse import DEMO, made_by

    torch.set_num_threads(options.threads)
    target, generate = (
        _demo(options) if options.model == DEMO else made_by("tune", options.model, "generate")
    )
    speedup = options.speedup
    if speedup is None and options.error is None:
        speedup = DEMO_SPEEDUP
    journal = options.journal or options.out.with_suffix(".journal")
    found = tune(
        generate,
        target,
        speedup=speedup,
        error=options.error,
        steps=options.steps,
        reference=options.reference,
        seeds=options.seeds,
        minutes=options.minutes,
        progress=not options.quiet,
        journal=journal,
    )
    print(found)
    print(f"recipe: {found.save(options.out)}")
    picture = options.picture or options.out.with_suffix(".png")
    try:
        print(f"picture: {found.plot(picture)}")
    except ImportError as error:
        print(f"no picture: {error}")
    if options.journal is None and found.evidence["complete"]:
        journal.unlink(missing_ok=True)
    return 0


def _demo(options: argparse.Namespace) -> tuple[Any, Callable[..., Any]]:
    import torch

    from ..demo.model import load_model
    from ..demo.sample import generate

    model, labels = load_model(), torch.arange(options.batch) % 10

    def run(cache: Any = None, num_inference_steps: int = 28, seed: int = 0) -> Any:
        return generate(
            model,
            labels,
            steps=num_inference_steps,
            seed=seed,
            guidance=options.guidance,
            cache=cache,
        )

    return model, run


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        help="demo, or module:callable that returns (target, generate); generate(cache, num_inference_steps, seed) "
        "is one generation, and takes those of the three that it declares",
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--speedup", type=float, help="the nearest run so many times as fast; 2")
    goal.add_argument("--error", type=float, help="the fastest run within so many dB of PSNR")
    parser.add_argument(
        "--steps", type=_steps, default=28, help="a number, several as 28,50, or any; 28"
    )
    parser.add_argument("--reference", choices=("uncached", "converged"), default="uncached")
    parser.add_argument("--seeds", type=_whole_numbers, default=(0, 1), help="as 0,1,2; 0,1")
    parser.add_argument("--minutes", type=float, help="time limit")
    parser.add_argument("--out", type=Path, default=Path("tuning.json"), help="the recipe file")
    parser.add_argument("--picture", type=Path, help="beside the recipe file if not given")
    parser.add_argument(
        "--journal",
        type=Path,
        help="what lets an interrupted tuning go on; beside the recipe file until it is done",
    )
    parser.add_argument("--batch", type=int, default=2, help="images of the demo model")
    parser.add_argument("--guidance", type=float, help="scale for the demo model; none by default")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    parser.set_defaults(run=_tune)


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _steps(text: str) -> Any:
    if text == "any":
        return text
    found = _whole_numbers(text)
    return found if len(found) > 1 else found[0]
