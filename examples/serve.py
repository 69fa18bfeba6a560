# SPDX-License-Identifier: Apache-2.0
"""A server in one process: requests arrive at any time, one model and one cache serve them all.

    python examples/serve.py --requests 12 --rate 4

Each request is a task that denoises its own picture, in the quality that it asks for. The model runs in a
worker thread, one call at a time, so the event loop stays free to accept requests; `cache.run` keeps their
caches apart, each with its own recipe, and `max_bytes` bounds what they take together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastcache
from fastcache.demo.data import NULL_LABEL, unpack
from fastcache.demo.model import denoise, load_model
from fastcache.demo.sample import GUIDANCE, initial_noise, sigmas

QUALITIES = ("quality", "balanced", "fast", "off")


@dataclass
class Request:
    """What a client asks for."""

    number: int
    label: int
    steps: int
    quality: str  # a preset's name, or "off": every step is computed


class Server:
    """The model, its cache and the thread that runs them."""

    def __init__(self, model: nn.Module, config: object, max_bytes: int | None) -> None:
        self.model = model
        self.cache = fastcache.enable(model, config, max_bytes=max_bytes)
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.most = 0  # bytes held after any call

    @torch.no_grad()
    def step(self, request: Request, index: int, tokens: Tensor) -> Tensor:
        """One denoising step of one request: both guidance branches, then Euler."""
        levels = sigmas(request.steps)
        sigma = torch.tensor([levels[index]])
        velocity = {}
        for name, label in (("cond", request.label), ("uncond", NULL_LABEL)):
            with self.cache.context(name, step_index=index):
                velocity[name] = denoise(self.model, tokens, sigma, torch.tensor([label]))
        self.most = max(self.most, self.cache.nbytes())
        guided = velocity["uncond"] + GUIDANCE * (velocity["cond"] - velocity["uncond"])
        return tokens + (levels[index + 1] - levels[index]) * guided

    async def generate(self, request: Request) -> Tensor:
        """The picture of one request, [1, 1, 16, 16]. Steps of other requests run in between."""
        loop = asyncio.get_running_loop()
        tokens = initial_noise(1, seed=request.number)
        run = self.cache.run(
            request.number, num_inference_steps=request.steps, recipe=request.quality
        )
        with run:  # left also where the client goes away
            for index in range(request.steps):
                inside = contextvars.copy_context()  # the worker is in this run, for one step
                work = inside.run, self.step, request, index, tokens
                tokens = await loop.run_in_executor(self.worker, *work)
        return unpack(tokens)

    def close(self) -> None:
        self.worker.shutdown()
        self.cache.disable()


async def serve(
    server: Server, requests: int, rate: float, seed: int, qualities: Sequence[str] = QUALITIES
) -> dict[int, Tensor]:
    """Requests arrive at random moments, `rate` per second, each of a random quality; their pictures by number."""
    clients, pictures = random.Random(seed), {}
    tasks = []

    async def handle(request: Request) -> None:
        pictures[request.number] = await server.generate(request)
        records = [r for r in server.cache.stats if r.request == request.number]
        computed = sum(r.action == "compute" for r in records)
        print(
            f"\rrequest {request.number:>3}: digit {request.label}, {request.quality}, {request.steps} steps, "
            f"{computed} calls computed, {len(records) - computed} reused"
        )

    for number in range(requests):
        steps, quality = clients.choice((12, 20, 28)), clients.choice(qualities)
        request = Request(number, clients.randrange(10), steps, quality)
        tasks.append(asyncio.create_task(handle(request)))
        await asyncio.sleep(clients.expovariate(rate))
        if sys.stderr.isatty():
            arrived = f"{number + 1} arrived, {len(pictures)} done"
            print(f"\r{arrived} of {requests}", end="", file=sys.stderr, flush=True)
    await asyncio.gather(*tasks)
    return pictures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve requests on the shipped demo model.")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument(
        "--qualities",
        nargs="+",
        default=QUALITIES,
        help="what clients ask for: presets' names, off",
    )
    parser.add_argument("--max-mib", type=float, default=4.0, help="budget of the cache, MiB")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    server = Server(load_model(), "balanced", int(options.max_mib * 2**20))
    try:
        asyncio.run(serve(server, options.requests, options.rate, options.seed, options.qualities))
        stats = server.cache.stats
        print(
            f"{options.requests} requests, {len(stats)} denoiser calls: {stats.computed} computed, "
            f"{stats.reused} reused; at most {server.most / 2**20:.2f} MiB held"
        )
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
