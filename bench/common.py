# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: environment, timing, traffic counts, JSON lines, tables.

Contenders are timed in interleaved rounds, all of them warmed up first, and compared by medians. On a
shared machine ratios within one process mean something and absolute times little; with one thread the
clock is that thread's CPU time, so that waiting for other processes is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


RESULTS = ROOT / "bench" / "results"


Row = dict[str, Any]


def commit() -> str:
    """The checked-out commit, with "+" where tracked files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    except OSError:  # no git on this machine
        head, changed = "", ""
    return (head or os.environ.get("FASTCACHE_COMMIT", "unknown")) + "+" * bool(head and changed)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: str = "cpu") -> Row:
    """Device, versions, commit and threads: part of every JSON line."""
    from fastcache.ops.backends import cpp

    name, driver = (_processor(), None) if device == "cpu" else _gpu()
    row: Row = {
        "device": name,
        "kind": device,
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }
    if device == "cpu":
        row["isa"] = cpp.capability() if cpp.available() is True else None
        row["load"] = round(os.getloadavg()[0], 2)
        row["clock"] = clock().__name__
    else:
        row["cuda"] = torch.version.cuda
        row["driver"] = driver
    for package in ("diffusers", "cache-dit"):
        row[package] = version(package)
    return row


def _gpu() -> tuple[str, str | None]:
    """Name and driver, where possible without a context on the device."""
    said = nvidia_smi("name", "driver_version")
    return (said["name"], said["driver_version"]) if said else (torch.cuda.get_device_name(), None)


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What the tool says of the first GPU; nothing where it is not installed or fails."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return {}
    return dict(zip(fields, said[0].split(", "), strict=False)) if said else {}


def quantiles(samples: Sequence[float]) -> Row:
    """Median and the 20th and 80th percentile, by nearest rank."""
    ordered = sorted(samples)

    def at(p: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, math.ceil(p * len(ordered)) - 1))]

    return {"p20": at(0.2), "p50": statistics.median(ordered), "p80": at(0.8)}


def clock() -> Callable[[], float]:
    """The clock of CPU measurements: with one thread its own CPU time, which other processes do not stop."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds(run: Callable[[], object], device: str = "cpu", repeat: int = 1) -> float:
    """Seconds per call of `run`: by `clock`, or by device events on a GPU."""
    if device == "cpu":
        now = clock()
        start = now()
        for _ in range(repeat):
            run()
        return (now() - start) / repeat
    start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(repeat):
        run()
    end.record()
    end.synchronize()
    return start_event.elapsed_time(end) / 1e3 / repeat


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    repeat: int = 1,
    warmup: int = 2,
    tick: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one sample per round, the order turning every round."""
    for run in contenders.values():
        for _ in range(warmup):
            run()
    if device != "cpu":
        torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(seconds(contenders[name], device, repeat))
        if tick is not None:
            tick()
    return samples


def last_cache_bytes(device: str = "cpu") -> int:
    """Size of the largest cache, which a working set must exceed several times over."""
    if device != "cpu":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        factor = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * factor)
    return max(sizes) or 32 * 2**20


class Rotation:
    """Hands out one of several buffer sets, the next one with every call."""

    def __init__(self, sets: Sequence[Any]) -> None:
        self.sets, self.at = sets, 0

    def __call__(self) -> Any:
        self.at = (self.at + 1) % len(self.sets)
        return self.sets[self.at]


def write_lines(path: Path, rows: Iterable[Row], append: bool = False) -> None:
    """One JSON object per line; infinities and NaN become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w") as file:
        for row in rows:
            file.write(json.dumps(_finite(row), sort_keys=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# what older rows of a benchmark leave out
DEFAULTS: dict[str, Row] = {"quality": {"model": "flux", "dtype": "fp32"}}


def read_lines(path: Path | None) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if path is None or not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [DEFAULTS.get(row.get("bench"), {}) | row for row in rows]


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on the terminal; an empty row separates sections."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        if row:
            table.add_row(*("" if v is None else str(v) for v in row))
        else:
            table.add_section()
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


def bar(total: int, what: str) -> Any:
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, file=sys.stderr, mininterval=0.5)


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The options all benchmarks share."""
    p = argparse.ArgumentParser(
        prog=f"python -m bench {name}", description=(doc or "").split("\n\n")[0]
    )
    p.add_argument("--quick", action="store_true", help="tiny sizes: checks that it runs")
    p.add_argument("--json", type=Path, help="write JSON lines to this file")
    p.add_argument("--resume", action="store_true", help="keep what the --json file holds already")
    p.add_argument("--plot", type=Path, help="write a picture to this file")
    p.add_argument("--threads", type=int, default=1, help="torch threads")
    return p


def spread(row: Row, scale: float = 1e3, digits: int = 2) -> str:
    """p20/p50/p80 of a row of seconds, in milliseconds by default."""
    return " / ".join(f"{row[p] * scale:.{digits}f}" for p in ("p20", "p50", "p80"))


def load_file(name: str, path: Path) -> Any:
    """A module from a path outside every package, such as a helper of the tests."""
    from importlib.util import module_from_spec, spec_from_file_location

    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
