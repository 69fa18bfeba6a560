"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibrate import Calibration
    from .recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
CONFIG_HELP = (
    'a config by name, JSON such as \'{"config": "FirstBlockCacheConfig", "threshold": 0.1}\', a '
    'recipe \'{"when": {...}, "what": {...}}\', or a .json file with one of these or a calibration'
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. What goes wrong is one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = args[:1] == ["--traceback"]
    args = args[traceback:]
    try:
        if args and args[0] in PASSED_ON:  # they have arguments of their own
            return PASSED_ON[args[0]](args[1:])
        options = _parser().parse_args(args)
        return options.run(options)
    except (ValueError, ImportError, OSError) as error:
        if traceback:
            raise
        print(f"fastcache: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastcache: interrupted", file=sys.stderr)
        return 130


def _demo(args: list[str]) -> int:
    from .demo.run import main as demo

    return demo(args)


def _info(args: list[str]) -> int:
    from .info import main as info

    if args:
        print("usage: fastcache info\n\nwhat runs here, and why the rest does not")
        return 0 if args[0] in ("-h", "--help") else 2
    return info()


def _bench(args: list[str]) -> int:
    """Hand over to the benchmarks of the checkout, in a process of their own."""
    if not (ROOT / "bench" / "__main__.py").is_file():
        raise FileNotFoundError(
            f"bench: {ROOT / 'bench'} does not exist; benchmarks are part of the repository, not "
            "of the installed package: clone it and run `make bench` there"
        )
    # not `-m bench`: that would take a package of this name in the current directory
    code = (
        f"import runpy, sys; sys.path[0] = {str(ROOT)!r}; "
        "runpy.run_module('bench', run_name='__main__', alter_sys=True)"
    )
    return subprocess.call([sys.executable, "-c", code, *args])


PASSED_ON: dict[str, Callable[[list[str]], int]] = {"demo": _demo, "bench": _bench, "info": _info}


# --- plan and inspect -----------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
    from .configs import Config
    from .named import config_from

    config = config_from(options.config)
    recipe = config.recipe() if isinstance(config, Config) else config
    plan = recipe.plan(options.steps, options.timesteps)
    if options.json:
        rows = dict(zip(plan.labels, plan.rows, strict=True))
        print(json.dumps({"steps": len(plan), "computed": plan.computed, "rules": rows}, indent=1))
    else:
        print(plan)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .inspect_model import Shapes, inspect_model
    from .named import DEMO, config_from, dtype_from, model_from

    usual = Shapes(64, 4, dtype="float32") if options.model == DEMO else Shapes()
    dtype_from(options.dtype or usual.dtype)
    shapes = Shapes(
        options.tokens if options.tokens is not None else usual.tokens,
        options.text_tokens if options.text_tokens is not None else usual.text_tokens,
        options.width,
        options.batch,
        options.dtype or usual.dtype,
        options.contexts,
    )
    model = model_from(options.model, _object("--init", options.init))
    found = inspect_model(model, config_from(options.config), steps=options.steps, shapes=shapes)
    print(json.dumps(found.record(), indent=1) if options.json else found.text())
    return 0


def _object(name: str, text: str | None) -> dict[str, Any]:
    """A JSON object given as an argument, or in a file."""
    if text is None:
        return {}
    source = Path(text).read_text("utf-8") if text.endswith(".json") else text
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be a JSON object, or a .json file with one")
    return value


# --- calibrate ------------------------------------------------------------------------------------


def _calibrate(options: argparse.Namespace) -> int:
    import torch

    from .calibrate import calibrate
    from .named import DEMO

    torch.set_num_threads(options.threads)
    target, run = _demo_run(options) if options.model == DEMO else _own_run(options.model)
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
    if options.check and picks:
        _check(picks, target, run)
    return 0


def _demo_run(options: argparse.Namespace) -> tuple[Any, Callable[..., Any]]:
    import torch

    from .demo.model import load_model
    from .demo.sample import generate

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


def _own_run(name: str) -> tuple[Any, Callable[..., Any]]:
    from .named import object_from

    if ":" not in name:
        raise ValueError(
            f"calibrate: model is {name!r}, must be `demo` or module:callable that returns "
            "(target, run), run(cache) being one generation"
        )
    made = object_from(name)()
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[1]):
        raise ValueError(f"calibrate: {name} must return (target, run), run(cache) one generation")
    return made


def _blocks(target: Any) -> int:
    """Blocks of the first denoiser: FirstBlockCache runs one of them on every step."""
    from .adapters import adapter_for
    from .runtime import denoisers_of
    from .targets.bind import block_lists

    model = denoisers_of(target)[0][1]
    return sum(len(blocks) for _, blocks in block_lists(model, adapter_for(model)))


def _picks(calibration: Calibration, blocks: int, speedup: float) -> list[tuple[str, Recipe]]:
    """Print the thresholds that compute what a speed-up leaves; returns them as recipes."""
    from . import FirstBlock, Magnitude, Recipe, Taylor

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
    return picks


def _check(picks: list[tuple[str, Recipe]], target: Any, run: Callable[..., Any]) -> None:
    """Run once with and once without each pick, and say what it came to."""
    from . import Mask, Recipe, enable
    from .calibrate import generate_with

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


# --- arguments ------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="fastcache",
        description="A kernel-accelerated cache runtime for diffusion transformers.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--version", action="version", version=f"fastcache {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in (
        ("demo", "generate with a small trained model, cached and uncached: table and picture"),
        ("bench", "run a benchmark of the checkout: ops, steps, quality, graphs, report"),
        ("info", "what runs on this machine, and why the rest does not"),
    ):
        commands.add_parser(name, help=text, add_help=False)
    _calibrate_arguments(
        commands.add_parser("calibrate", help="measure a model, pick thresholds, save as JSON")
    )
    _inspect_arguments(
        commands.add_parser("inspect", help="what a config would hook, skip and hold in memory")
    )
    plan = commands.add_parser("plan", help="the schedule of a config before the first step")
    plan.add_argument("config", help=CONFIG_HELP)
    plan.add_argument("--steps", type=int, required=True, help="denoiser calls of a run")
    plan.add_argument(
        "--timesteps", type=_numbers, help="comma-separated; evenly spaced from 1000 if not given"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)
    return parser


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="demo, the name of a diffusers class, or module:callable")
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--init", help="JSON object of constructor arguments, or a .json file")
    parser.add_argument("--steps", type=int, default=28, help="denoiser calls of a run")
    parser.add_argument("--tokens", type=int, help="image tokens (4096; demo: 64)")
    parser.add_argument("--text-tokens", type=int, help="text tokens (512; demo: 4)")
    parser.add_argument(
        "--width", type=int, help="features of a token, where it cannot be read off"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", help="of the hidden states (bfloat16; demo: float32)")
    parser.add_argument("--contexts", type=int, default=1, help="2 for sequential guidance")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        help="demo, or module:callable that returns (target, run), run(cache) being one generation",
    )
    parser.add_argument("--out", type=Path, default=Path("calibration.json"))
    parser.add_argument("--picture", type=Path, help="beside the JSON file if not given")
    parser.add_argument("--speedup", type=_speedup, default=2.0, help="target, larger than 1")
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


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _speedup(text: str) -> float:
    value = float(text)
    if not 1 < value < 100:
        raise argparse.ArgumentTypeError("must be larger than 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
