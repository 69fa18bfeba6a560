# SPDX-License-Identifier: Apache-2.0
"""What a recording call has shown is held against every computed step: where it no longer holds, the step computes.

Situations as they come up in pipelines. Each step is held against the uncached model, or, where it reuses what
the same inputs gave a step before, against that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache import FirstBlockCacheConfig, Guided, Interval, Mask, Recipe, Reuse, Taylor

pytestmark = pytest.mark.filterwarnings("ignore::fastcache.FastcacheWarning")


def masked(text: str, what: Any = None) -> Recipe:
    """C computes, a point reuses."""
    return Recipe(Mask(compute=[int(c == "C") for c in text]), what or Reuse())


def actions(cache: fastcache.Cache) -> str:
    return "".join({"compute": "C", "reuse": "."}.get(r.action, "?") for r in cache.stats)


def close(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def drive(
    model: nn.Module, config: Any, calls: list[dict[str, Any]], run: Callable | None = None
) -> tuple[list[Tensor], str]:
    """Outputs and actions of a run in one context."""
    outputs = []
    with fastcache.enable(model, config) as cache, torch.no_grad():
        target = model if run is None else run(model)
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i):
                outputs.append(first(target(**call)))
        return outputs, actions(cache)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def plain(model: nn.Module, calls: list[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [first(model(**call)) for call in calls]


# what computes every other step, or where it is told to
SETTINGS = {
    "mask": masked("CC.CC..."),
    "first block": Recipe(fastcache.FirstBlock(1e-4, warmup=0, last=False, max_skips=1), Reuse()),
}


def compiled(model: nn.Module) -> Callable:
    return fastcache.compile(model, backend="eager")


# --- what is added between blocks begins at zero ------------------------------------------------------------


def controlled(name: str, count: int, single: int = 0) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model and four calls: two scaled by zero, then two with a ControlNet's residuals."""
    model, call = tiny.build(name, 4)
    width = model.inner_dim
    g = torch.Generator().manual_seed(1)
    tokens = {"SD3": 64, "QwenImage": 16}.get(name) or call["hidden_states"].shape[1]
    if name == "SD3":
        height, patch = call["hidden_states"].shape[-1], model.config.patch_size
        tokens = (height // patch) ** 2
    batch = call["hidden_states"].shape[0]
    draw = lambda n: [torch.randn(batch, tokens, width, generator=g) for _ in range(n)]  # noqa: E731
    key = "block_controlnet_hidden_states" if name == "SD3" else "controlnet_block_samples"
    residuals = {key: draw(count)} | (
        {"controlnet_single_block_samples": draw(single)} if single else {}
    )
    calls = []
    for scale in (0.0, 0.0, 1.0, 1.0):
        scaled = {k: [scale * r for r in v] for k, v in residuals.items() if v}
        calls.append({**call, **scaled, "return_dict": False})
    return model, calls


CONTROLS = [
    ("SD3", 4, 0),
    ("SD3", 2, 0),
    ("SD3", 1, 0),
    ("Flux", 4, 0),
    ("Flux", 2, 4),
    ("Flux", 0, 2),
    ("QwenImage", 4, 0),
    ("QwenImage", 2, 0),
]


@pytest.mark.parametrize(("name", "count", "single"), CONTROLS)
@pytest.mark.parametrize("config", ["mask", "first block"])
def test_a_controlnet_that_begins_later_is_added_once(name, count, single, config):
    model, calls = controlled(name, count, single)
    want = plain(model, calls)
    settings = masked("CCC.") if config == "mask" else SETTINGS[config]
    if config == "first block" and not count:
        calls.insert(0, calls[0])  # its second call learns, and computes
        want.insert(0, want[0])
    outputs, seen = drive(model, settings, calls)
    assert seen in ("CCC.", "C.C.", "CC.C.")
    for got, right in zip(outputs, want, strict=True):
        close(got, right)


@pytest.mark.parametrize(("name", "count", "single"), CONTROLS[:1] + CONTROLS[4:5])
def test_a_controlnet_that_begins_later_is_added_once_compiled(name, count, single):
    model, calls = controlled(name, count, single)
    want = plain(model, calls)
    outputs, seen = drive(model, masked("CCC."), calls, compiled)
    assert seen == "CCC."
    for got, right in zip(outputs, want, strict=True):
        close(got, right)


class Loop(toys.Model):
    """A loop over one or two lists that changes its ways when it is told to."""

    between: Any = None  # added between blocks
    inplace = False
    gap: Any = None  # added between the lists
    joined = False  # the text goes in front, from the second list on
    skip: tuple = ()
    stop = 99
    turned = False  # the lists in the other order
    twice = False

    def through(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        names = self.lists[::-1] if self.turned else self.lists
        for n, name in enumerate(names * 2 if self.twice else names):
            if n and self.gap is not None:
                hidden = hidden + self.gap
            if n and self.joined:
                hidden = torch.cat([torch.ones_like(hidden[:, :2]), hidden], 1)
            for i, block in enumerate(getattr(self, name)):
                if i in self.skip:
                    continue
                if i >= self.stop:
                    break
                hidden = block(hidden)
                if self.between is not None:
                    if self.inplace:
                        hidden += self.between
                    else:
                        hidden = hidden + self.between
        if self.joined:
            hidden = hidden[:, 2:]
        return hidden, text


CHANGES: dict[str, tuple[dict, dict]] = {
    "added between blocks": ({}, {"between": 0.5}),
    "zeros between blocks": ({"between": torch.zeros(1)}, {"between": torch.ones(1)}),
    "zeros between blocks, in place": (
        {"between": torch.zeros(1), "inplace": True},
        {"between": torch.ones(1)},
    ),
    "added in place between blocks": ({}, {"between": torch.ones(1), "inplace": True}),
    "added between lists": ({}, {"gap": 0.5}),
    "zeros between lists": ({"gap": torch.zeros(1)}, {"gap": torch.ones(1)}),
    "zeros between lists, joined": (
        {"gap": torch.zeros(1), "joined": True},
        {"gap": torch.ones(1)},
    ),
    "no longer added": ({"between": 0.5}, {"between": None}),
    "joined from now on": ({}, {"joined": True}),
    "the first block left out": ({}, {"skip": (0,)}),
    "the second block left out": ({}, {"skip": (1,)}),
    "the last block left out": ({}, {"skip": (2,)}),
    "all but the first left out": ({}, {"skip": (1, 2)}),
    "stops early": ({}, {"stop": 2}),
    "stops at once": ({}, {"stop": 0}),
    "the first block back": ({"skip": (0,)}, {"skip": ()}),
    "the last block back": ({"stop": 2}, {"stop": 99}),
    "another order of lists": ({}, {"turned": True}),
    "lists run twice": ({}, {"twice": True}),
}  # fmt: skip


def behave(model: nn.Module, *changes: dict[str, Any]) -> None:
    """The model as its class has it, but for these changes."""
    for name in ("between", "inplace", "gap", "joined", "skip", "stop", "turned", "twice"):
        model.__dict__.pop(name, None)
    for change in changes:
        model.__dict__.update(change)


# what is written into is not counted under inference mode
COUNTED = [(c, i) for c in CHANGES for i in (False, True) if not (i and "in place" in c)]


@pytest.mark.parametrize("lists", [("blocks",), ("blocks", "layers")])
@pytest.mark.parametrize("config", ["mask", "first block"])
@pytest.mark.parametrize(("change", "inference"), COUNTED)
def test_a_loop_that_changes_its_ways_computes_and_is_learnt_anew(change, config, lists, inference):
    before, after = CHANGES[change]
    model = Loop(lists=lists, depth=3)
    call = toys.inputs(1)[0]
    outputs, want, guard = [], [], torch.inference_mode if inference else torch.no_grad
    with fastcache.enable(model, SETTINGS[config]) as cache, guard():
        for i in range(8):
            behave(model, before, after if i >= 4 else {})
            with cache.context("cond", step_index=i):
                outputs.append(model(**call).clone())
        seen = actions(cache)
        cache.disable()
        for i in range(8):
            behave(model, before, after if i >= 4 else {})
            want.append(model(**call))
    assert "?" not in seen
    for i, (got, right) in enumerate(zip(outputs, want, strict=True)):
        torch.testing.assert_close(got, right, rtol=2e-5, atol=2e-5, msg=f"step {i} of {seen}")


# --- layers that are left out -------------------------------------------------------------------------------


LEFT_OUT = [
    *(
        (left_out, config, names, False)
        for left_out in ([0], [1], [2], [3], [0, 3], [0, 1, 2, 3])
        for config in ("mask", "first block", "taylor")
        for names in ("one", "two")
    ),
    ([0], "mask", "two", True),
]


@pytest.mark.parametrize(("left_out", "config", "names", "compiles"), LEFT_OUT)
def test_skip_layer_guidance_never_mixes_with_the_full_set(left_out, config, names, compiles):
    """SD3's third call of a step, in a context of its own or, by mistake, in that of the first."""
    model, call = tiny.build("SD3", 4)
    settings = {
        "mask": lambda: masked("CC.C."),
        "taylor": lambda: masked("CC.C.", Taylor(1)),
        "first block": lambda: FirstBlockCacheConfig(1e-4),
    }[config]()
    calls = [
        {**call, "return_dict": False},
        {**call, "skip_layers": left_out, "return_dict": False},
    ]
    full, less = plain(model, calls)
    with fastcache.enable(model, settings) as cache, torch.no_grad():
        target = compiled(model) if compiles else model
        for i in range(5):
            with cache.context("cond", step_index=i):
                close(target(**calls[0])[0], full)
            with cache.context("cond" if names == "one" else "slg", step_index=i):
                close(target(**calls[1])[0], less)
        assert "?" not in actions(cache)
        if names == "two":
            reused = {r.context for r in cache.stats if r.action == "reuse"}
            assert "cond" in reused


# --- lengths that a mask decides ----------------------------------------------------------------------------


def lengths(name: str, given: list[int]) -> tuple[nn.Module, list[dict[str, Any]]]:
    model, call = tiny.build(name, 3)
    calls = []
    for length in given:
        mask = call["encoder_attention_mask"]
        calls.append(
            {
                **call,
                "encoder_attention_mask": (torch.arange(mask.shape[1]) < length)
                .to(mask.dtype)[None]
                .expand(len(mask), -1),
                "return_dict": False,
            }
        )
    return model, calls


@pytest.mark.parametrize(
    "config",
    [
        lambda: FirstBlockCacheConfig(0.0),
        lambda: FirstBlockCacheConfig(1e-6),
        lambda: masked("CC.CC.C."),
        lambda: masked("CC.CC.C.", Taylor(1)),
        lambda: Recipe(Mask(compute=[1, 1, 1, 0, 1, 1, 1, 0]), Guided()),
        lambda: Recipe(Interval(2), Reuse(), fastcache.Modules(kind="attention")),
        lambda: Recipe(Interval(3), Taylor(1), fastcache.Modules(kind="attention")),
    ],
)
@pytest.mark.parametrize("given", [[16, 16, 12, 12, 12, 12, 16, 16], [16, 12] * 4])
def test_a_mask_that_changes_the_length_inside_is_computed(config, given):
    model, calls = lengths("Lumina2", given)
    recipe = config()
    whole = isinstance(recipe, FirstBlockCacheConfig) or recipe.rules[0].where == fastcache.Stack()
    outputs, seen = drive(model, recipe, calls)
    assert "?" not in seen
    for i, (got, right) in enumerate(zip(outputs, plain(model, calls), strict=True)):
        assert got.shape == right.shape
        if seen[i] == "C" or (whole and given[i] == given[i - 1]):
            close(got, right)
        if whole and given[i] != given[i - 1]:  # some modules may be of one length throughout
            assert seen[i] == "C", f"step {i} of {seen} met another length"


# --- dtypes inside ------------------------------------------------------------------------------------------


class Lifting(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = hidden_states.float()
        return hidden + super().forward(hidden)


class Sinking(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = hidden_states.float()
        return (hidden + super().forward(hidden)).bfloat16()


class Typed(nn.Module):
    def __init__(self, block: type[nn.Module], head: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 8).to(head)

    def forward(self, hidden_states: Tensor, timestep: Any = None) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.head(hidden_states)


PREDICTIONS = {
    "reuse": lambda: masked("CCCCC."),
    "taylor": lambda: masked("CCCCC.", Taylor(1)),
    "guided": lambda: masked("CCCCC.", Guided()),
    "first block": lambda: FirstBlockCacheConfig(1e-4),
}
STREAMS = {
    "lifted from bfloat16": (Lifting, torch.bfloat16, torch.float32),
    "lifted from float16": (Lifting, torch.float16, torch.float32),
    "sunk": (Sinking, torch.float32, torch.bfloat16),
}
KEPT = [
    *((s, p, k, False) for s in STREAMS for p in PREDICTIONS for k in (None, torch.bfloat16)),
    *((s, p, torch.float8_e4m3fn, False) for s in STREAMS for p in PREDICTIONS if p != "guided"),
    *(("lifted from bfloat16", p, None, True) for p in PREDICTIONS),
]


@pytest.mark.parametrize(("streams", "prediction", "kept", "compiles"), KEPT)
def test_a_prediction_has_the_dtype_of_what_it_stands_for(streams, prediction, kept, compiles):
    (block, given, head), recipe = STREAMS[streams], PREDICTIONS[prediction]()
    model = Typed(block, head)
    x = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).to(given)
    calls = [{"hidden_states": x, "timestep": torch.tensor([1000.0 - i])} for i in range(6)]
    want = plain(model, calls)
    with fastcache.enable(model, recipe, cache_dtype=kept) as cache, torch.no_grad():
        target = compiled(model) if compiles else model
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i):
                got = target(**call)
            assert got.dtype == want[i].dtype
            rough = 2e-5 if kept is None and head == torch.float32 else 0.1
            torch.testing.assert_close(got, want[i], rtol=rough, atol=rough)
        assert "." in actions(cache)


def test_storage_follows_a_dtype_that_changes_within_a_run():
    model = toys.Model()
    call = toys.inputs(1)[0]
    with fastcache.enable(model, masked("CCCC..")) as cache, torch.no_grad():
        outputs = []
        for i in range(6):
            with (
                cache.context("cond", step_index=i),
                torch.autocast("cpu", torch.bfloat16, enabled=i >= 2),
            ):
                outputs.append(model(**call))
        assert actions(cache) == "CCCC.."
    assert torch.equal(outputs[1], outputs[0])
    assert outputs[4].dtype == outputs[3].dtype
    torch.testing.assert_close(outputs[4].float(), outputs[3].float(), rtol=0.02, atol=0.02)


# --- blocks that come and go --------------------------------------------------------------------------------


def appended(model: nn.Module) -> None:
    model.blocks.append(toys.Block().requires_grad_(False))


def inserted(model: nn.Module) -> None:
    model.blocks.insert(0, toys.Block().requires_grad_(False))


def removed(model: nn.Module) -> None:
    del model.blocks[1]


def exchanged(model: nn.Module) -> None:
    model.blocks[1] = toys.Block().requires_grad_(False)


class Growing(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 1.5 * hidden_states


def exchanged_first(model: nn.Module) -> None:
    model.blocks._modules["0"] = Growing()


def exchanged_last(model: nn.Module) -> None:
    setattr(model.blocks, str(len(model.blocks) - 1), Growing())


@pytest.mark.parametrize("walk", ["iter", "index", "enumerate", "zip", "listed", "slices"])
@pytest.mark.parametrize(
    "change", [appended, inserted, removed, exchanged, exchanged_first, exchanged_last]
)
@pytest.mark.parametrize("config", ["mask", "first block"])
def test_blocks_that_were_changed_after_enable_are_learnt_anew(change, config, walk):
    """The change comes before a step that computes by plan, as a new run does, or decides by the first block."""
    torch.manual_seed(0)
    model = toys.Model(walk=walk, depth=4)
    call = toys.inputs(1)[0]
    settings = masked("CC.CC..") if config == "mask" else FirstBlockCacheConfig(1e-4)
    outputs = []
    with fastcache.enable(model, settings) as cache, torch.no_grad():
        before = None
        for i in range(7):
            if i == 3:
                before = outputs[-1]
                torch.manual_seed(5)
                change(model)
                if config == "first block":
                    cache.reset()
            with cache.context("cond", step_index=i):
                outputs.append(model(**call))
        seen = actions(cache)
        cache.disable()
        want = model(**call)
    assert not torch.allclose(before, want)
    assert "?" not in seen and seen[-1] == "."
    for got in outputs[3:]:
        close(got, want)


def test_a_block_appended_before_a_step_that_was_to_be_reused_is_not_an_error():
    model, calls = toys.Model(walk="index"), toys.inputs(4)
    with fastcache.enable(model, masked("CC..")) as cache, torch.no_grad():
        for i, call in enumerate(calls):
            if i == 2:
                appended(model)
            with cache.context("cond", step_index=i):
                got = model(**call)
                if i == 2:
                    late = got
        assert actions(cache) == "CCC."
        cache.disable()
        close(late, model(**calls[2]))


def test_lists_that_were_emptied_say_so():
    model, calls = toys.Model(), toys.inputs(2)
    with fastcache.enable(model, masked("CC")) as cache, torch.no_grad():
        with cache.context("cond", step_index=0):
            model(**calls[0])
        del model.blocks[:]
        with pytest.raises(ValueError, match=r"\['blocks'\] hold no blocks any more"):
            with cache.context("cond", step_index=1):
                model(**calls[1])


# --- blocks that give back what they got --------------------------------------------------------------------


class Leaving(toys.Block):
    out = False

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_states if self.out else super().forward(hidden_states, scale)


class Skipping(toys.Model):
    """Holds on to what enters, as a long skip connection does."""

    def through(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        entered = hidden
        for block in self.blocks:
            hidden = block(hidden)
        return hidden + 0.1 * entered, text


@pytest.mark.parametrize("which", [(0,), (1,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("config", ["mask", "first block"])
@pytest.mark.parametrize("late", [False, True])
def test_layers_that_return_early_are_no_error(which, config, late):
    model = Skipping(block=Leaving, depth=4)
    call = toys.inputs(1)[0]
    outputs, want = [], []
    with fastcache.enable(model, SETTINGS[config]) as cache, torch.no_grad():
        for i in range(8):
            for n in which:
                model.blocks._modules[str(n)].out = i >= 4 if late else True
            with cache.context("cond", step_index=i):
                outputs.append(model(**call))
        assert "?" not in actions(cache)
        cache.disable()
        for i in range(8):
            for n in which:
                model.blocks._modules[str(n)].out = i >= 4 if late else True
            want.append(model(**call))
    for got, right in zip(outputs, want, strict=True):
        close(got, right)


# --- blocks that begin to write into their input ------------------------------------------------------------


class Writing(toys.Block):
    writes = False

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        if not self.writes:
            return super().forward(hidden_states, scale)
        return hidden_states.add_(self.change(hidden_states.clone()))


def test_blocks_that_begin_to_write_into_their_input_are_learnt_anew():
    model, call = toys.Model(block=Writing), toys.inputs(1)[0]
    outputs = []
    with fastcache.enable(model, masked("CCCC..")) as cache, torch.no_grad():
        for i in range(6):
            for block in model.blocks._modules.values():
                block.writes = i >= 2
            with cache.context("cond", step_index=i):
                outputs.append(model(**call))
        seen = actions(cache)
        cache.disable()
        want = model(**call)
    assert seen == "CCCC.."
    for got in outputs:
        close(got, want)
