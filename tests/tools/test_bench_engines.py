# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cache-dit's reused step, and what its function calls and instructions come to."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("cache_dit", minversion="1.5")
pytest.importorskip("diffusers", minversion="0.36")

engines = pytest.importorskip("bench.engines", reason="needs the source tree")
quietly = pytest.importorskip("bench.systems").quietly


def test_a_reused_step_of_cache_dit_calls_and_runs_less(tmp_path):
    """Counts do not depend on what else the machine does; times do."""
    out = tmp_path / "engines.jsonl"
    assert engines.main(["--quick", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["case"] for r in rows} == {engines.FLOOR, *engines.CONTENDERS}
    found = engines.claims(rows)
    called = [c for c in found if "function calls" in c["claim"]]
    assert len(called) == 4 and all(claim["met"] for claim in called), called
    run = [c for c in found if "instructions" in c["claim"]]
    assert len(run) == 4 and all(claim["met"] for claim in run), run
    timed = [r for r in rows if r["case"] != engines.FLOOR]
    assert len(timed) == 6
    for row in timed:
        assert row["own_operators"] + row["own_python"] == pytest.approx(row["own"])


class Seen(TorchDispatchMode):
    """Names of the operators that run, but for those that only allocate."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0].rstrip("_")  # written in place or not
        if not name.startswith("empty"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


BY_ADDRESS = (
    Counter()
)  # kernels that no mode sees; the runtime calls none of them where a mode looks on


def noting(known):
    """`known` of the benchmark, whose kernels count their calls."""

    def found(op):
        kernel, code = known(op)

        def run(*args):
            BY_ADDRESS[op] += 1
            return kernel(*args)

        return run, code

    return found


def operators_of(step):
    BY_ADDRESS.clear()
    with Seen() as seen:
        step()
    return seen.names + BY_ADDRESS


def test_the_operators_that_are_called_bare_are_those_of_a_reused_step(monkeypatch):
    """Else what is left of a step without them would be no Python."""
    monkeypatch.setattr(engines.operators, "known", noting(engines.operators.known))
    with torch.no_grad(), quietly():
        found = engines.cases(6)
        ran = engines.counted(found, operators_of)
        engines.backend.uninstall()
    model = ran[engines.FLOOR, ""]
    beyond = {name: count - model for name, count in ran.items()}
    assert all(not model - count for count in ran.values())
    for case in engines.CONTENDERS:
        for method in engines.METHODS:
            assert beyond[case, method] == beyond[engines.BARE + case, method], (case, method)
    assert sum(beyond["cache-dit", "Taylor 1"].values()) == 22
    assert beyond["install()", "Taylor 1"] == Counter(["residual_l1", "linear_combine"])


def test_costs_are_parted_into_operators_and_python():
    at = {(engines.FLOOR, ""): 5.0, ("a", "m"): 9.0, (engines.BARE + "nobody", ""): 5.5}
    at[engines.BARE + "a", "m"] = 6.5
    assert engines.costs(at, "a", "m") == {"own": 4.0, "own_operators": 1.0, "own_python": 3.0}


def test_of_several_processes_the_medians_count(monkeypatch):
    processes = pytest.importorskip("bench.processes")
    runs = [[{"case": "floor", "p20": t}, {"case": "a", "p20": 2 * t, "own": t}] for t in (3, 1, 2)]
    assert processes.medians(runs, ("p20", "own")) == [
        {"case": "floor", "p20": 2, "processes": 3},
        {"case": "a", "p20": 4, "own": 2, "processes": 3},
    ]
    out = []
    monkeypatch.setattr(engines, "show", out.extend)
    assert engines.main(["--quick", "--rounds", "1", "--processes", "2"]) == 0
    assert {r["case"] for r in out} == {engines.FLOOR, *engines.CONTENDERS}
    assert all(r["processes"] == 2 for r in out)


def test_instructions_are_counted_and_nothing_else():
    def step(n):
        return lambda: sum(i for i in range(n))

    few, more, most = (engines.executed(step(n)) for n in (0, 10, 20))
    assert 0 < few < more and most - more == more - few
