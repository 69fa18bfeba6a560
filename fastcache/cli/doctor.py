# SPDX-License-Identifier: Apache-2.0
"""`fastcache doctor`: whether a cache will work on a pipeline or model of your own."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from typing import Any


def _doctor(options: argparse.Namespace) -> int:
    from ..checks import whole
    from ..tools.doctor import diagnose
    from .parse import config_from, written

    if options.steps is not None:
        whole("doctor", "steps", options.steps, 1)
    config = None if options.config is None else config_from(options.config)
    target, run = target_from(options.model)
    found = diagnose(
        target,
        config,
        written="" if config is None else written(options.config, config),
        run=run,
        steps=options.steps,
    )
    print(json.dumps(found.record(), indent=1) if options.json else found.text())
    return int(not found.works)


def target_from(text: str) -> tuple[Any, Callable[..., Any] | None]:
    """A pipeline or model to look at, and one generation with it where a function returns both.

    An object is taken as it is, also where it can be called, as pipelines can.
    """
    from .parse import model_from, object_from, pair

    found = object_from(text) if ":" in text else None
    if found is None:
        return model_from(text), None
    if inspect.isroutine(found) or inspect.isclass(found):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise ValueError(
                f"doctor: {text} cannot be called without arguments ({error}); name a function that makes the pipeline"
            ) from error
        found = found()
    return pair("doctor", text, found, "run") if isinstance(found, tuple) else (found, None)


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="demo, the name of a diffusers class, or module:name of a pipeline, a model or a function that returns "
        "one; one that returns (target, run) has run(cache), one generation, tried too",
    )
    parser.add_argument("--config", help="as of inspect; left out, the first that fits")
    parser.add_argument("--steps", type=int, help="denoiser calls of a run; the pipeline's own")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)
