# SPDX-License-Identifier: Apache-2.0
"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .calibrate import calibrate_arguments
from .doctor import doctor_arguments
from .tune import tune_arguments

ROOT = Path(__file__).resolve().parents[2]


CONFIG_HELP = (
    'a preset or a config by name, JSON such as \'{"config": "FirstBlockCacheConfig", "threshold": 0.1}\', a '
    'recipe \'{"when": {...}, "what": {...}}\', or a .json file with one of these, a saved recipe or a calibration'
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. What goes wrong is one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = args[:1] == ["--traceback"]
    args = args[traceback:]
    try:
        if args and args[0] in PASSED_ON:  # these commands parse their own arguments
            return PASSED_ON[args[0]](args[1:])
        options = make_parser().parse_args(args)
        status: int = options.run(options)
        return status
    except (ValueError, ImportError, OSError) as error:
        if traceback:
            raise
        print(f"fastcache: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastcache: interrupted", file=sys.stderr)
        return 130


def _demo(args: list[str]) -> int:
    """The demo of the model that ships, or that of the checkout's model, which parses its own arguments."""
    choice = argparse.ArgumentParser(prog="fastcache demo", add_help=False)
    choice.add_argument("--model", choices=("digits", "pictures"), default="digits")
    given, rest = choice.parse_known_args(args)
    if given.model == "pictures":
        return _bench(["pictures", *rest])

    from ..demo.run import main as demo

    return demo(rest)


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
            "of the installed package: clone it and run the command there"
        )
    # `python -m bench` would run a package of this name in the current directory
    code = (
        f"import runpy, sys; sys.path[0] = {str(ROOT)!r}; "
        "runpy.run_module('bench', run_name='__main__', alter_sys=True)"
    )
    return subprocess.call([sys.executable, "-c", code, *args])


PASSED_ON: dict[str, Callable[[list[str]], int]] = {"demo": _demo, "bench": _bench, "info": _info}


def _plan(options: argparse.Namespace) -> int:
    from ..configs.given import settings_of
    from .parse import config_from

    recipe, _ = settings_of(config_from(options.config))
    plan = recipe.plan(options.steps, options.timesteps)
    if options.json:
        rows = dict(zip(plan.labels, plan.rows, strict=True))
        print(json.dumps({"steps": len(plan), "computed": plan.computed, "rules": rows}, indent=1))
    else:
        print(plan)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from ..parts import dtype_named
    from ..tools.inspect import inspect_model
    from ..tools.memory import Shapes
    from .parse import DEMO, config_from, model_from

    usual = Shapes(64, 4, dtype="float32") if options.model == DEMO else Shapes()
    dtype_named(options.dtype or usual.dtype)
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


def make_parser() -> argparse.ArgumentParser:
    from .. import __version__

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
    calibrate_arguments(
        commands.add_parser("calibrate", help="measure a model, pick thresholds, save as JSON")
    )
    tune_arguments(
        commands.add_parser("tune", help="find the best recipe for a model by whole runs of it")
    )
    doctor_arguments(
        commands.add_parser(
            "doctor", help="whether a cache will work on a model, and what to write"
        )
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


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
