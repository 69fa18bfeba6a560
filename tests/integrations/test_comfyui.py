# SPDX-License-Identifier: Apache-2.0
"""The node pack under a fake model patcher: layouts, guidance, restoring, windows, two models at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import comfy_world as world
import pytest
import torch
import toys
from torch.nn.functional import mse_loss

from fastcache.integrations import comfyui
from fastcache.integrations.comfyui.methods import METHODS, SCHEDULE, recipe_of, schedule

STEPS = 12


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    package, extension = ModuleType("comfy"), ModuleType("comfy.patcher_extension")
    package.__path__, extension.WrappersMP = [], world.WrappersMP
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", extension)


class Shown:
    """The browser's end."""

    def __init__(self, monkeypatch) -> None:
        self.said: list[tuple[str, str]] = []
        server = ModuleType("server")
        server.PromptServer = type("PromptServer", (), {"instance": self})
        monkeypatch.setitem(sys.modules, "server", server)

    def send_progress_text(self, text, node_id):
        self.said.append((node_id, text))


def patched(patcher, method="first block", threshold=0.3, speed=2.0, **more):
    (copy,) = comfyui.NODE_CLASS_MAPPINGS["FastcacheModel"]().patch(
        patcher, method, threshold, speed, **more
    )
    return copy


def test_the_pack_says_what_comfyui_asks_for():
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    (node,) = comfyui.NODE_CLASS_MAPPINGS.values()
    assert node.RETURN_TYPES == ("MODEL",) and callable(getattr(node, node.FUNCTION))
    asked = node.INPUT_TYPES()
    assert list(asked["required"]) == [
        "model", "method", "threshold", "speed", "start_percent", "end_percent",
    ]  # fmt: skip
    assert asked["required"]["method"][0] == list(METHODS)


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "two calls"])
@pytest.mark.parametrize("layout", world.LAYOUTS)
def test_threshold_0_is_the_uncached_run_and_more_is_close_to_it(layout, together, monkeypatch):
    network = world.LAYOUTS[layout]().eval()
    patcher, before = world.Patcher(network), toys.snapshot(network)
    expected = world.Guider(patcher, together).sample(STEPS)
    shown = Shown(monkeypatch)
    for method in METHODS:
        never = patched(patcher, method, threshold=0.0, speed=1.0)
        assert torch.equal(world.Guider(never, together).sample(STEPS), expected), method
        cached = patched(patcher, method, threshold=0.5, node_id="7")
        found = world.Guider(cached, together).sample(STEPS)
        node, text = shown.said[-1]
        assert node == "7" and "." in text and not torch.equal(found, expected), method
        assert mse_loss(found, expected) < 0.05 * expected.var(), method
    assert toys.snapshot(network) == before
    assert torch.equal(world.Guider(patcher, together).sample(STEPS), expected)


def rows(text):
    """Marks by branch of what is shown."""
    return dict(line.split(": ") for line in text.splitlines()[1:])


def test_both_styles_of_guidance_have_their_states(monkeypatch):
    shown = Shown(monkeypatch)
    copy = patched(world.Patcher(world.Flux().eval()), threshold=0.9, node_id="1")
    world.Guider(copy, together=True).sample(STEPS)
    assert rows(shown.said[-1][1]) == {"cond + uncond": "CCC" + "." * 9}
    world.Guider(copy, together=False).sample(STEPS)
    assert rows(shown.said[-1][1]) == dict.fromkeys(("cond", "uncond"), "CCC" + "." * 9)
    world.Guider(copy, together=False, areas=2).sample(STEPS)
    assert set(rows(shown.said[-1][1])) == {"cond", "cond, 2", "uncond"}


def test_nothing_is_reused_outside_of_the_window(monkeypatch):
    shown = Shown(monkeypatch)
    patcher = world.Patcher(world.WanModel().eval())
    copy = patched(patcher, threshold=0.9, start_percent=0.5, end_percent=0.8, node_id="1")
    world.Guider(copy, together=True).sample(10)
    (marks,) = rows(shown.said[-1][1]).values()
    assert marks[:5] == "CCCCC" and "." in marks[5:8] and marks[9:] == "C"


def test_two_models_at_once_know_nothing_of_each_other():
    networks = [world.Flux(seed=s).eval() for s in (0, 1)]
    alone = [
        world.Guider(patched(world.Patcher(n), threshold=0.9), True, seed=i).sample(STEPS)
        for i, n in enumerate(networks)
    ]
    copies = [patched(world.Patcher(n), threshold=0.9) for n in networks]
    inner = {}

    class Nested(world.Guider):
        """The second model is sampled half way through the first one."""

        def predict(self, x, sigma):
            if not inner and sigma < 0.5:
                inner["found"] = world.Guider(copies[1], True, seed=1).sample(STEPS)
            return super().predict(x, sigma)

    outer = Nested(copies[0], True, seed=0).sample(STEPS)
    assert torch.equal(outer, alone[0]) and torch.equal(inner["found"], alone[1])


def test_an_error_while_sampling_restores_the_model(monkeypatch):
    network = world.MMDiT().eval()
    before, patcher = toys.snapshot(network), world.Patcher(network)
    copy = patched(patcher, threshold=0.9)

    class Failing(world.Guider):
        def predict(self, x, sigma):
            if sigma < 0.4:
                raise RuntimeError("stopped")
            return super().predict(x, sigma)

    with pytest.raises(RuntimeError, match="stopped"):
        Failing(copy, True).sample(STEPS)
    assert toys.snapshot(network) == before
    first = world.Guider(copy, True).sample(STEPS)
    assert torch.equal(first, world.Guider(copy, True).sample(STEPS))


def test_another_nodes_function_wrapper_is_kept():
    patcher, seen = world.Patcher(world.Flux().eval()), []

    def other(function, given):
        seen.append(given["cond_or_uncond"])
        return function(given["input"], given["timestep"], **given["c"])

    patcher.set_model_unet_function_wrapper(other)
    world.Guider(patched(patcher, threshold=0.9), True).sample(4)
    assert seen == 4 * [[0, 1]]


def test_a_call_outside_of_sampling_is_the_models_own():
    patcher = world.Patcher(world.Flux().eval())
    x, sigma = torch.randn(1, world.TOKENS, 4), torch.tensor(0.5)
    with torch.no_grad():
        calls = [world.Guider(p, True).call(x, sigma, [0]) for p in (patcher, patched(patcher))]
    assert torch.equal(*calls)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method": "magic"}, "method"),
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"speed": 0.5}, "speed"),
        ({"start_percent": 0.9, "end_percent": 0.2}, "start_percent"),
    ],
)
def test_bad_input_is_said_and_the_model_left_alone(fields, message):
    patcher = world.Patcher(world.Flux().eval())
    with pytest.raises(ValueError, match=message):
        patched(patcher, **fields)
    assert not patcher.wrappers and "model_function_wrapper" not in patcher.model_options


def test_outside_of_comfyui_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", None)
    with pytest.raises(ImportError, match="ComfyUI is not installed"):
        patched(world.Patcher(world.Flux().eval()))


def test_a_schedule_computes_what_its_speed_leaves():
    for steps in (1, 2, 4, 12, 28, 50):
        for speed in (1.0, 1.3, 2.0, 4.0):
            marks = schedule(steps, speed)
            assert len(marks) == steps and marks[0] == marks[-1] == 1
            assert sum(marks) == min(steps, max(4, -(-steps // speed)))
    assert len(recipe_of(SCHEDULE, 2.0, 0.0, 28).plan(28).computed) == 14


def test_the_workflow_in_the_docs_fits_the_node():
    page = Path(__file__).parents[2] / "docs" / "comfyui-workflow.json"
    if not page.exists():
        pytest.skip("needs the source tree")
    workflow = json.loads(page.read_text())
    (ours,) = (n for n in workflow.values() if n["class_type"] in comfyui.NODE_CLASS_MAPPINGS)
    asked = comfyui.NODE_CLASS_MAPPINGS[ours["class_type"]].INPUT_TYPES()["required"]
    assert ours["inputs"].keys() == asked.keys() and ours["inputs"]["method"] in METHODS
    for node in workflow.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in workflow
