# SPDX-License-Identifier: Apache-2.0
"""A wheel in clean environments: it installs without a compiler, its C++ kernels run, its sources fit.

    python tests/clean_environments.py dist/NAME.whl --beside .venv .venv-torch   # torch as these environments have it
    python tests/clean_environments.py dist/NAME.whl --torch 2.10.0 2.14.1        # torch installed, several GB each
    python tests/clean_environments.py dist/NAME.whl --python python3.12 --torch 2.11.0

Of a Python that no torch is asked for, and none is beside, the sources are compiled and the metadata read.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# The package is the wheel's, its library does the work of a run, and gives what the reference gives.
SMOKE = """
import sys
import fastcache, torch
from fastcache.ops import dispatch
from fastcache.ops.backends import cpp

site = sys.argv[1]
assert fastcache.__file__.startswith(site), fastcache.__file__
assert str(cpp.LIBRARY).startswith(site) and dispatch.active("cpu") == "cpp", fastcache.backends()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, y = torch.randn(2, 2, 64, 96).to(dtype)
    calls = {"residual_apply": (x, y), "linear_combine": ([x, y], [0.25, -1.5]), "residual_l1": (x, y, x)}
    for op, args in calls.items():
        found, wanted = [], []
        for name, results in (("cpp", found), ("reference", wanted)):
            with fastcache.backend(name):
                results.append(getattr(fastcache.ops, op)(*args))
        torch.testing.assert_close(found, wanted, msg=f"{op} {dtype}")

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))
    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = hidden_states + 0.01 * block(hidden_states)
        return hidden_states

model = Model().eval().requires_grad_(False)
with fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.025)) as cache, cache.run(num_inference_steps=8):
    for i in range(8):
        model(torch.full((1, 16, 32), 1.0 + 0.01 * i))
    assert cache.stats.reused and "kernels: cpp" in cache.summary(), cache.summary()
python = ".".join(map(str, sys.version_info[:3]))
print(f"python {python}, torch {torch.__version__}: kernels {cpp.capability()}, {cache.stats.reused} of 8 reused")
"""

READ = """
import compileall, importlib.metadata as m, sys
assert compileall.compile_dir(sys.argv[1], quiet=2), "does not compile"
wheel = m.distribution("fastcache-dit").read_text("WHEEL")
print(f"python {'.'.join(map(str, sys.version_info[:3]))}, no torch: installs, compiles")
"""


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    """A command that finds no compiler, and nothing of the checkout."""
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTCACHE_DISABLE_EXT")}
    settings = bare | {"PATH": "/nowhere", "CC": "none", "CXX": "none"} | env
    return subprocess.run(command, env=settings, capture_output=True, text=True, cwd="/")


def environment(folder: Path, python: str) -> tuple[Path, Path]:
    """A new environment without pip: its interpreter, and where its packages lie."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside = folder / "bin" / "python"
    found = subprocess.run([inside, "-c", code], check=True, capture_output=True, text=True)
    return inside, Path(found.stdout.strip())


def sites(folder: str) -> list[str]:
    """Where an environment's packages lie, and those of the one that it sees itself."""
    (site,) = Path(folder).resolve().glob("lib/python3.*/site-packages")
    base = site / "base.pth"
    seen = base.read_text().split("'")[1:2] if base.exists() else []
    return [str(site), *seen]


def install(python: Path, *what: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = run([*pip, "install", "-q", *what])
    if done.returncode:
        raise SystemExit(f"{' '.join(what)} does not install:\n{done.stdout}{done.stderr}")


def check(wheel: Path, python: str, torch: str | None, beside: str | None) -> str:
    """Install the wheel into an environment of its own and run it there; returns what that said."""
    with tempfile.TemporaryDirectory() as folder:
        inside, site = environment(Path(folder).resolve() / "venv", python)
        if torch is not None:
            install(inside, f"torch=={torch}", str(wheel))  # with all that the wheel asks for
        else:
            install(inside, "--no-index", "--no-deps", str(wheel))
        if (
            beside is not None
        ):  # paths alone: what these environments hold of fastcache stays unseen
            (site / "beside.pth").write_text("\n".join(sites(beside)))
        code = READ if torch is None and beside is None else SMOKE
        done = run([str(inside), "-I", "-W", "error::UserWarning", "-c", code, str(site)])
        if done.returncode:
            raise SystemExit(f"{wheel.name} on {python}:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()


def here(python: str) -> bool:
    try:
        return subprocess.run([python, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("wheel", type=Path)
    p.add_argument("--beside", nargs="+", default=[], help="environments that have a torch")
    p.add_argument("--torch", nargs="+", default=[], help="versions to install")
    p.add_argument("--python", nargs="+", default=[], help="interpreters; this one")
    options = p.parse_args(argv)
    wheel = options.wheel.resolve()
    if "-py3-none-" not in wheel.name or wheel.name.endswith("any.whl"):
        raise SystemExit(f"{wheel.name} is not a wheel with libraries for every Python")
    for folder in options.beside:
        print(check(wheel, str(Path(folder).resolve() / "bin" / "python"), None, folder))
    for python in options.python or [sys.executable] * bool(options.torch):
        if not here(python):
            print(f"{python}: not here")
            continue
        for torch in options.torch or [None]:
            print(check(wheel, python, torch, None))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
