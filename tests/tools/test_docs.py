# SPDX-License-Identifier: Apache-2.0
"""The documents: their code runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastcache
from fastcache.cli import command as commands

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
AROUND = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]

pytestmark = pytest.mark.skipif(not PAGES[0].exists(), reason="needs the source tree")


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


class Pipeline:
    """A pipeline around the shipped model, which drives the cache as those of diffusers do."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.transformer = model

    @torch.no_grad()
    def __call__(
        self, prompt: str, num_inference_steps: int = 28, generator: torch.Generator | None = None
    ) -> SimpleNamespace:
        from fastcache.demo.sample import initial_noise, sigmas

        seed = len(prompt) if generator is None else generator.initial_seed()
        tokens, levels = initial_noise(1, seed=seed), sigmas(num_inference_steps)
        for sigma, following in pairwise(levels):
            with self.transformer.cache_context("cond"):
                velocity = denoise(self.transformer, tokens, sigma, prompt)
            tokens = tokens + (following - sigma) * velocity
        self.transformer._reset_stateful_cache()
        return SimpleNamespace(images=[tokens])


def denoise(model, tokens: torch.Tensor, sigma: float, prompt: str = "a cat") -> torch.Tensor:
    from fastcache.demo.data import NULL_LABEL
    from fastcache.demo.model import denoise

    label = len(prompt) % NULL_LABEL if prompt else NULL_LABEL
    return denoise(model, tokens, torch.full((1,), sigma), torch.tensor([label]))


def inputs(sigma: float) -> dict[str, object]:
    """Keyword arguments of one call of the shipped model."""
    from fastcache.demo.data import encode_labels, position_ids
    from fastcache.demo.sample import initial_noise

    text, pooled = encode_labels(torch.tensor([3]))
    image_ids, text_ids = position_ids()
    return {
        "hidden_states": initial_noise(1, seed=0),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": torch.tensor([sigma]),
        "img_ids": image_ids,
        "txt_ids": text_ids,
        "return_dict": False,
    }


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    pytest.importorskip("diffusers")
    from fastcache.demo.model import load_model

    return load_model()


@pytest.fixture
def world(model):
    """What the pages take for granted."""
    from fastcache.demo.sample import initial_noise, sigmas

    yield {
        "pipe": Pipeline(model),
        "model": model,
        "denoise": denoise,
        "latents": initial_noise(1, seed=0),
        "timesteps": sigmas(28)[:-1],
        "calls": [inputs(sigma) for sigma in sigmas(12)[:-1]],
    }
    if attached := model.__dict__.get("_fastcache"):  # the page failed half way
        attached.owner.disable()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
@pytest.mark.filterwarnings("error:fastcache")
def test_code_runs_as_it_stands(page, world, model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for number, source in enumerate(blocks(page), 1):
        with torch.no_grad():
            exec(compile(source, f"{page.name}, block {number}", "exec"), world)
    fastcache.enable(model, fastcache.FirstBlockCacheConfig()).disable()  # nothing was left behind


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page):
    parser = commands.make_parser()
    known = next(a for a in parser._actions if a.choices).choices
    for command in re.findall(r"^ {4}fastcache (\w+)", page.read_text(), re.MULTILINE):
        assert command in known
    for command in re.findall(r"`fastcache (\w+)", page.read_text()):
        assert command in known


def anchors(page: Path) -> set[str]:
    """What links into a page may name, as forges and the site make them of its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\s-]", "", w).strip().replace(" ", "-") for w in words}


@pytest.mark.parametrize("page", [*PAGES, *AROUND], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([\w-]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert anchor in anchors(page.parent / target if target else page), (target, anchor)
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_make_comes_first_in_the_readme():
    """Nothing but git clone and cd before the two commands."""
    lines = [line.strip() for line in PAGES[0].read_text().splitlines() if line.startswith("    ")]
    assert [line.split("#")[0].split() for line in lines[:4]] == [
        ["git", "clone", "<this", "repository>", "fastcache"],
        ["cd", "fastcache"],
        ["make", "demo"],
        ["make", "test"],
    ]
