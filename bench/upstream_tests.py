# SPDX-License-Identifier: Apache-2.0
"""Run diffusers' own model-level cache tests, unmodified, on fastcache.

    python bench/upstream_tests.py CHECKOUT [--every-model] [--own-hooks] [pytest arguments]

CHECKOUT is a clone of huggingface/diffusers; only its `tests` are used, the library is the installed one.
Its tests instantiate the cache mixins for Flux; `--every-model` applies the five mixins to every model test
class whose model takes a cache. `--own-hooks` runs the same tests without fastcache, for comparison.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import pytest

from fastcache.integrations import diffusers as backend

MIXINS = (
    "PyramidAttentionBroadcastTesterMixin",
    "FasterCacheTesterMixin",
    "FirstBlockCacheTesterMixin",
    "TaylorSeerCacheTesterMixin",
    "MagCacheTesterMixin",
)


def every_model(checkout: Path) -> list[tuple[str, type]]:
    """A test class per model test of the checkout and mixin, made as upstream makes those of Flux."""
    from diffusers.models.cache_utils import CacheMixin

    mixins = importlib.import_module("tests.models.testing_utils.cache")
    found: dict[str, type] = {}
    for path in sorted((checkout / "tests/models/transformers").glob("test_models_*.py")):
        try:
            module = importlib.import_module(f"tests.models.transformers.{path.stem}")
        except ImportError as error:
            print(f"left out: {path.stem}: {error}")
            continue
        for value in vars(module).values():
            made = isinstance(value, type) and value.__module__ == module.__name__
            if made and value.__name__.endswith("TesterConfig") and hasattr(value, "get_init_dict"):
                model = value().model_class
                if issubclass(model, CacheMixin):
                    found.setdefault(model.__name__, value)
    classes = []
    for name, tester in found.items():
        for mixin in MIXINS:
            title, base = f"Test{name}{mixin.removesuffix('TesterMixin')}", getattr(mixins, mixin)
            # as upstream does for Flux: the dummy inputs hold no guidance batch
            config = {**getattr(base, "FASTER_CACHE_CONFIG", {}), "is_guidance_distilled": True}
            body = {"FASTER_CACHE_CONFIG": config} if "FasterCache" in mixin else {}
            classes.append((title, type(title, (tester, base), body)))
    return classes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--every-model", action="store_true")
    parser.add_argument("--own-hooks", action="store_true")
    args, rest = parser.parse_known_args()
    checkout = args.checkout.resolve()
    if not (checkout / "tests/models/testing_utils").is_dir():
        parser.error(f"{checkout} holds no tests/models/testing_utils of diffusers")
    # before collection: upstream's tests import what they test when they are imported
    if not args.own_hooks:
        backend.install()
    sys.path.insert(0, str(checkout))
    where = "its own hooks" if args.own_hooks else "fastcache"
    print(f"diffusers {diffusers.__version__} from {Path(diffusers.__file__).parent}, on {where}")
    with tempfile.TemporaryDirectory() as folder:
        files = (checkout / "tests/models").rglob("test_*.py")
        chosen = [str(f) for f in files if "CacheTesterMixin" in f.read_text()]
        chosen += ["-m", "cache"]
        if args.every_model:
            sys.modules["upstream_tests"] = sys.modules[__name__]
            chosen = [f"{folder}/test_every_model.py"]
            Path(chosen[0]).write_text(
                "from pathlib import Path\nimport upstream_tests\n"
                f"globals().update(upstream_tests.every_model(Path({str(checkout)!r})))\n"
            )
        os.chdir(checkout)
        return pytest.main([*chosen, "-q", "-p", "no:cacheprovider", *rest])


if __name__ == "__main__":
    raise SystemExit(main())
