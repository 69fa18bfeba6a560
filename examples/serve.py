# SPDX-License-Identifier: Apache-2.0
"""A server in one process: requests arrive at any time, one model and one cache serve them all.

    python examples/serve.py --requests 12 --rate 4

Each request is a task that denoises its own picture. The model runs in a worker thread, one call at a time,
so the event loop stays free to accept requests; `request=` keeps their caches apart, `max_bytes` bounds
what they take together.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastcache
from fastcache.demo.data import NULL_LABEL, unpack
from fastcache.demo.model import denoise, load_model
from fastcache.demo.sample import GUIDANCE, initial_noise, sigmas


@dataclass
class Request:
    """What a client asks for."""

    number: int
    label: int
    steps: int


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
            with self.cache.context(
                name,
                request=request.number,
                step_index=index,
                num_inference_steps=request.steps,
            ):
                velocity[name] = denoise(self.model, tokens, sigma, torch.tensor([label]))
        self.most = max(self.most, self.cache.nbytes())
        guided = velocity["uncond"] + GUIDANCE * (velocity["cond"] - velocity["uncond"])
        return tokens + (levels[index + 1] - levels[index]) * guided

    async def generate(self, request: Request) -> Tensor:
        """The picture of one request, [1, 1, 16, 16]. Steps of other requests run in between."""
        loop = asyncio.get_running_loop()
        tokens = initial_noise(1, seed=request.number)
        try:
            for index in range(request.steps):
                tokens = await loop.run_in_executor(self.worker, self.step, request, index, tokens)
        finally:  # also where the client goes away
            self.cache.reset(request.number)
        return unpack(tokens)

    def close(self) -> None:
        self.worker.shutdown()
        self.cache.disable()


async def serve(server: Server, requests: int, rate: float, seed: int) -> dict[int, Tensor]:
    """Requests arrive at random moments, `rate` per second; their pictures by number."""
    clients, pictures = random.Random(seed), {}
    tasks = []

    async def handle(request: Request) -> None:
        pictures[request.number] = await server.generate(request)
        records = [r for r in server.cache.stats if r.request == request.number]
        computed = sum(r.action == "compute" for r in records)
        print(
            f"\rrequest {request.number:>3}: digit {request.label}, {request.steps} steps, "
            f"{computed} calls computed, {len(records) - computed} reused"
        )

    for number in range(requests):
        request = Request(number, clients.randrange(10), clients.choice((12, 20, 28)))
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
    parser.add_argument("--preset", default="balanced", help="quality, balanced or fast")
    parser.add_argument("--max-mib", type=float, default=4.0, help="budget of the cache, MiB")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    config = fastcache.preset(options.preset)
    server = Server(load_model(), config, int(options.max_mib * 2**20))
    try:
        asyncio.run(serve(server, options.requests, options.rate, options.seed))
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
