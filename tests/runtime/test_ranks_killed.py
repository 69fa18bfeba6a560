# SPDX-License-Identifier: Apache-2.0
"""One of several ranks under torchrun is killed while requests run; run as a script, this file is what they run."""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import distributed as dist

import fastcache

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

START, DEADLINE, PATIENCE = 60, 20, 100  # seconds: for a first meeting, of the group, for all of it
REQUESTS, KILLED_AT = 2, 5
# which rank is killed, in runs of what
CASES: dict[int, tuple[int, str, dict[str, Any]]] = {
    2: (0, "taylor_seer", {"max_bytes": 2**20}),  # which meets for its budget
    4: (2, "first_block", {}),  # which meets for its decisions
}


def samples(request: int, world: int) -> list[dict[str, Any]]:
    return toys.inputs(seed=request, batch=world, speed=0.05)


def served(
    method: str, runs: list[list[dict[str, Any]]], found: list, killed: bool, **given: Any
) -> None:
    """Requests that take turns; into `found` goes, per call, what was decided and what came out."""
    target = toys.Model()
    with fastcache.enable(target, toys.config(method), **given) as cache:
        for step in range(toys.STEPS):
            for request, calls in enumerate(runs):
                if killed and (step, request) == (KILLED_AT, 1):
                    os.kill(os.getpid(), signal.SIGKILL)
                with cache.context(
                    request=request, step_index=step, num_inference_steps=toys.STEPS
                ):
                    output = toys.step(target, calls[step])
                found.append((cache.stats[-1].action, output.tolist()))


def main(folder: Path) -> None:
    """A rank: the first time one of them is killed, and torchrun then starts all of them again."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would end the others at once
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # whatever waits for ever
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{again}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=START),
    )
    group = dist.new_group(timeout=datetime.timedelta(seconds=DEADLINE))
    victim, method, given = CASES[world]
    shards = [
        [{k: v[rank : rank + 1] for k, v in call.items()} for call in samples(request, world)]
        for request in range(REQUESTS)
    ]
    told: dict[str, Any] = {"error": "", "found": []}
    began = time.monotonic()
    try:
        served(
            method,
            shards,
            told["found"],
            rank == victim and not again,
            process_group=group,
            **given,
        )
    except RuntimeError as error:
        told["error"] = str(error)
    told["seconds"] = time.monotonic() - began
    (folder / f"{again}-{rank}.json").write_text(json.dumps(told))
    os._exit(bool(told["error"]))  # a group with a dead member would wait at its own end


@pytest.mark.parametrize("world", CASES)
def test_a_killed_rank_is_an_error_of_the_others_and_a_new_group_works(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command += [f"--nproc-per-node={world}", __file__, str(tmp_path)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as said:
        ranks = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            assert ranks.wait(2 * PATIENCE) == 0, log.read_text()[-2000:]
        finally:
            ranks.kill()
    told = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    victim, method, _ = CASES[world]
    survivors = {f"0-{rank}" for rank in range(world) if rank != victim}
    assert set(told) == survivors | {f"1-{rank}" for rank in range(world)}

    whole: list[tuple[str, list]] = []  # by one process that has all samples
    served(method, [samples(r, world) for r in range(REQUESTS)], whole, False)
    assert {"compute", "reuse"} == {action for action, _ in whole}
    for name, rank in told.items():
        if name in survivors:
            assert "process_group: a rank did not take part" in rank["error"]
            assert rank["seconds"] < 2 * DEADLINE
            assert len(rank["found"]) == REQUESTS * KILLED_AT + 1  # nothing came after it
        else:
            assert not rank["error"] and len(rank["found"]) == len(whole)
        own = int(name[2:])
        for (action, output), (wanted, outputs) in zip(rank["found"], whole, strict=False):
            assert action == wanted
            torch.testing.assert_close(
                torch.tensor(output), torch.tensor(outputs)[own : own + 1], rtol=1e-5, atol=1e-5
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
