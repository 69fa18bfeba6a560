# SPDX-License-Identifier: Apache-2.0
"""Requests per second and latency of one model under load: uncached, cached, batched, one at a time.

    python -m bench load --json out.jsonl
    python -m bench load --soak 30

Pictures of the shipped model are asked for at random moments, all with guidance and 28 steps. Time is the CPU time
of one thread: the clock stands still while nobody is served, and jumps to the next arrival. Each server is measured
twice in a round: overloaded, with arrivals at several times the rate of the slowest (requests per second), and with
arrivals at a rate that the slowest can take (latency, from arrival to picture). Rounds of all servers take turns in
one process.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastcache
from fastcache.demo.data import NULL_LABEL, encode_labels, position_ids, unpack
from fastcache.demo.metrics import psnr
from fastcache.demo.model import load_model
from fastcache.demo.sample import GUIDANCE, initial_noise, sigmas

from . import common, load_soak, systems
from .common import Row
from .load_soak import EARLY, MOST, SHARED

STEPS = 28  # of a request
# arrivals, as a multiple of the rate of the slowest server
OVERLOAD, LOAD = 8.0, 0.8
FORECAST = fastcache.Taylor(2, skip_first=True)
OURS = {"every 4, Taylor(2, skip_first)": fastcache.Recipe(EARLY, FORECAST)}
# The steps that `fastcache tune --guidance 2 --batch 12 --error 44.5` computes, found on other pictures.
TUNED = (0, 2, 7, 12, 16, 20, 24, 27)
# served mixed: what was tuned for the quality of the best peer, and the presets
MIXED = {
    "tuned, 8 steps, Taylor(2, skip_first)": fastcache.Recipe(
        fastcache.Mask(compute=[i in TUNED for i in range(STEPS)]), FORECAST
    ),
    **{name: fastcache.preset(name) for name in ("quality", "balanced", "fast")},
}
BRANCHES = ("cond", "uncond")


@dataclass
class Job:
    """A picture that is asked for. at: the step that comes next. arrives, leaves: seconds of the server's clock."""

    number: int
    label: int
    steps: int = STEPS
    arrives: float = 0.0
    leaves: float = 0.0
    at: int = 0
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self) -> Job:
        self.at, self.tokens = 0, initial_noise(1, seed=self.number)
        return self

    def advance(self, velocity: Tensor) -> None:
        """Euler, guided. velocity: [2, ...], of the conditional and the unconditional branch."""
        levels = sigmas(self.steps)
        cond, uncond = velocity.split(1)
        guided = uncond + GUIDANCE * (cond - uncond)
        self.tokens = self.tokens + (levels[self.at + 1] - levels[self.at]) * guided
        self.at += 1


def inputs_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """Keywords of one call for both branches of every job, [2 jobs, ...]."""
    labels = torch.tensor([label for job in jobs for label in (job.label, NULL_LABEL)])
    text, pooled = encode_labels(labels)
    levels = [float(sigmas(job.steps)[job.at]) for job in jobs for _ in BRANCHES]
    image_ids, text_ids = position_ids()
    return {
        "hidden_states": torch.cat([job.tokens for job in jobs for _ in BRANCHES]),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": torch.tensor(levels),
        "img_ids": image_ids,
        "txt_ids": text_ids,
        "return_dict": False,
    }


@dataclass
class Server:
    """One way to serve. most: requests at a time. call: the velocities of some jobs, [2 jobs, ...]."""

    name: str
    setting: str
    most: int
    call: Callable[[Sequence[Job]], Tensor]
    done: Callable[[Job], object] = lambda job: None

    def step(self, jobs: Sequence[Job]) -> None:
        for job, velocity in zip(jobs, self.call(jobs).split(2), strict=True):
            job.advance(velocity)


def plain(model: nn.Module, most: int) -> Server:
    def call(jobs: Sequence[Job]) -> Tensor:
        return model(**inputs_of(jobs))[0]

    return Server("uncached", "one at a time" if most == 1 else f"batches of {most}", most, call)


def peer(setting: str, config: Any) -> Server:
    """diffusers' own hooks, one request at a time, both branches in one call: they keep one state."""
    model = load_model()
    attached = systems.attach_diffusers(model, config)

    def call(jobs: Sequence[Job]) -> Tensor:
        with attached.context("cond_uncond", jobs[0].at, STEPS):
            return model(**inputs_of(jobs))[0]

    return Server("diffusers, one at a time", setting, 1, call, lambda job: attached.reset())


def cached(setting: str, recipe: fastcache.Recipe, how: str) -> Server:
    """how: "mixed", "one at a time", or "whole batch", which computes if any request must."""
    model = load_model()
    cache = fastcache.enable(model, recipe)
    due = [row == "compute" for row in recipe.plan(STEPS).rows[0]]

    def call(jobs: Sequence[Job]) -> Tensor:
        must = how == "whole batch" and any(due[job.at] for job in jobs)
        contexts = [
            cache.context(
                name,
                request=job.number,
                step_index=job.at,
                num_inference_steps=STEPS,
                compute=must,
            )
            for job in jobs
            for name in BRANCHES
        ]
        return fastcache.mixed_batch(model, contexts, inputs_of(jobs), shared=SHARED)[0]

    most = 1 if how == "one at a time" else MOST
    return Server(f"fastcache, {how}", setting, most, call, lambda job: cache.reset(job.number))


def peers() -> dict[str, Any]:
    """The settings of diffusers' hooks that serve this model best, of those in bench/results/quality-cpu.jsonl."""
    from diffusers import hooks

    def seer(n: int) -> Any:
        return hooks.TaylorSeerCacheConfig(
            cache_interval=n,
            disable_cache_after_step=STEPS - 1,
            use_lite_mode=True,
            taylor_factors_dtype=torch.float32,
        )

    return {
        "TaylorSeer, lite, every 4": seer(4),
        "TaylorSeer, lite, every 5": seer(5),
        "FirstBlock 0.15": hooks.FirstBlockCacheConfig(threshold=0.15),
    }


def servers(quick: bool) -> list[Server]:
    model, theirs = load_model(), peers()
    return [
        plain(model, 1),
        plain(model, MOST),
        *(peer(name, theirs[name]) for name in (list(theirs)[:1] if quick else theirs)),
        *(
            cached(name, recipe, how)
            for name, recipe in OURS.items()
            for how in ("one at a time", "whole batch", "mixed")
        ),
        *(cached(name, MIXED[name], "mixed") for name in list(MIXED)[: 2 if quick else None]),
    ]


def serve(server: Server, jobs: Sequence[Job]) -> float:
    """Serve jobs that arrive at their times; seconds from the first arrival to the last picture."""
    now, clock = 0.0, common.clock()
    waiting, running = sorted(jobs, key=lambda job: job.arrives), list[Job]()
    while waiting or running:
        while waiting and len(running) < server.most and waiting[0].arrives <= now:
            running.append(waiting.pop(0).begin())
        if not running:
            now = waiting[0].arrives
            continue
        start = clock()
        server.step(running)
        now += clock() - start
        for job in [job for job in running if job.at == job.steps]:
            job.leaves = now
            running.remove(job)
            server.done(job)
    return now - jobs[0].arrives


def jobs_of(count: int, rate: float, seed: int) -> list[Job]:
    """rate: arrivals per second, at random."""
    draw, now, jobs = random.Random(seed), 0.0, []
    for number in range(count):
        now += draw.expovariate(rate)
        jobs.append(Job(number, draw.randrange(10), arrives=now))
    return jobs


def pictures(jobs: Sequence[Job]) -> Tensor:
    return torch.cat([unpack(job.tokens) for job in sorted(jobs, key=lambda job: job.number)])


@torch.no_grad()
def measure(found: Sequence[Server], count: int, rounds: int, tick: Callable[[], Any]) -> list[Row]:
    """rounds: all servers take turns in each; medians are reported."""
    rates: list[list[float]] = [[] for _ in found]
    waits: list[list[float]] = [[] for _ in found]
    reference, nearness = torch.empty(0), [0.0] * len(found)
    slowest = 2 / serve(found[0], jobs_of(2, 1e6, seed=0))
    for turn in range(rounds):
        for i, server in enumerate(found):
            jobs = jobs_of(count, OVERLOAD * slowest, seed=0)
            rates[i].append(count / serve(server, jobs))
            if not turn:
                shown = pictures(jobs)
                reference = reference if i else shown
                nearness[i] = psnr(shown, reference)
            tick()
        slowest = min(statistics.median(each) for each in rates)
        for i, server in enumerate(found):
            jobs = jobs_of(count, LOAD * slowest, seed=1 + turn)
            serve(server, jobs)
            waits[i] += [job.leaves - job.arrives for job in jobs]
            tick()
    return [
        {
            "bench": "load",
            "server": server.name,
            "setting": server.setting,
            "most": server.most,
            "steps": STEPS,
            "requests": count,
            "rounds": rounds,
            "psnr": nearness[i],
            "requests_per_second": statistics.median(rates[i]),
            "rates": rates[i],
            "overload": OVERLOAD,
            "load": LOAD,
            "p50": statistics.quantiles(waits[i], n=20)[9],
            "p95": statistics.quantiles(waits[i], n=20)[18],
        }
        for i, server in enumerate(found)
    ]


def show(rows: Sequence[Row]) -> None:
    slowest = min(r["requests_per_second"] for r in rows)
    common.print_table(
        f"{rows[0]['requests']} requests of {STEPS} steps; latency at {LOAD:g} of the slowest server's rate",
        ["server", "setting", "PSNR", "requests/s", "times", "p50 s", "p95 s"],
        [
            [
                r["server"],
                r["setting"],
                f"{r['psnr']:.1f}",
                f"{r['requests_per_second']:.2f}",
                f"{r['requests_per_second'] / slowest:.2f}",
                f"{r['p50']:.2f}",
                f"{r['p95']:.2f}",
            ]
            for r in rows
        ],
    )


def main(argv: list[str] | None = None) -> int:
    p = common.parser("load", __doc__)
    p.add_argument("--requests", type=int, help="in each measurement")
    p.add_argument("--rounds", type=int, help="in which all servers take turns")
    p.add_argument(
        "--soak", type=float, help="minutes; serves random traffic and checks it instead"
    )
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.soak is not None:
        return load_soak.report(args.soak * 60, args.json)
    found = servers(args.quick)
    count, rounds = (
        args.requests or (4 if args.quick else 24),
        args.rounds or (1 if args.quick else 3),
    )
    with common.bar(2 * rounds * len(found), "load") as progress:
        rows = measure(found, count, rounds, progress.update)
    rows = [row | common.environment() for row in rows]
    show(rows)
    if args.json:
        common.write_lines(args.json, rows)
    return 0
