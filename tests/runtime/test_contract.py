# SPDX-License-Identifier: Apache-2.0
"""The public contract, sentence by sentence: models, contexts, runs, state and restoration.

Ops are in test_ops.py, bad values and fields in test_fields.py.
"""

from __future__ import annotations

import copy
import gc
import inspect
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache.policies import COMPUTE, REUSE

PLAIN = ("first_block", "mag_cache", "taylor_seer", "pyramid", "faster")
EVERY = toys.METHODS
STACKS = ("first_block", "mag_cache")


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def enabled(method: str, target: nn.Module | None = None, **changes: Any):
    """(cache, model, clock) of a toy."""
    clock, target = toys.Clock(), target if target is not None else toys.build(method)
    return fastcache.enable(target, toys.config(method, clock, **changes)), target, clock


# --- names and signatures -----------------------------------------------------------------------


def parameters(function: Any) -> list[tuple[str, Any, bool]]:
    """Name, default and whether only by keyword, of every argument but self."""
    return [
        (p.name, p.default, p.kind is p.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]


EMPTY = inspect.Parameter.empty
SIGNATURES = {
    "enable": [
        ("target", EMPTY, False),
        ("config", EMPTY, False),
        ("adapter", None, True),
        ("backend", "auto", True),
        ("process_group", None, True),
        ("max_bytes", None, True),
        ("cache_dtype", None, True),
        ("offload", False, True),
        ("ranks", "sum", True),
    ],
    "Cache.context": [
        ("name", "default", False),
        ("request", 0, True),
        ("step_index", None, True),
        ("num_inference_steps", None, True),
        ("timestep", None, True),
        ("sigma", None, True),
        ("compute", False, True),
    ],
    "Cache.run": [
        ("request", None, False),
        ("num_inference_steps", None, True),
        ("recipe", None, True),
    ],
    "Cache.disable": [],
    "Cache.update": [("config", EMPTY, False)],
    "Cache.summary": [],
    "Cache.plot": [("path", EMPTY, False)],
    "backends": [],
    "backend": [("name", EMPTY, False)],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found: Any = fastcache
    for part in name.split("."):
        found = getattr(found, part)
    assert parameters(found) == SIGNATURES[name]


def test_other_names_and_arguments():
    assert [p[0] for p in parameters(fastcache.Cache.reset)] == ["request"]
    assert [p[0] for p in parameters(fastcache.Recipe)] == ["when", "what", "where"]
    assert parameters(fastcache.Recipe.plan)[0][0] == "num_inference_steps"
    assert parameters(fastcache.compile)[0][0] == "model"
    assert [p.kind for p in inspect.signature(fastcache.compile).parameters.values()][-1] is (
        inspect.Parameter.VAR_KEYWORD
    )
    assert callable(fastcache.calibrate)
    assert {"save", "load"} <= set(dir(fastcache.Calibration))
    for method in PLAIN:
        assert isinstance(toys.config(method).recipe(), fastcache.Recipe)


def test_everything_named_in_all_exists():
    for name in fastcache.__all__:
        assert getattr(fastcache, name) is not None


def test_backends_say_true_or_why_not():
    found = fastcache.backends()
    assert list(found) == ["reference", "cpp", "triton", "cuda"]
    assert found["reference"] is True
    assert all(v is True or (isinstance(v, str) and v) for v in found.values())


def test_a_forced_backend_computes_the_same_run():
    calls = toys.inputs()
    expected = toys.alone(toys.Model, "taylor_seer", calls)
    for name in [n for n, v in fastcache.backends().items() if v is True and n != "triton"]:
        with fastcache.backend(name):
            forced = toys.alone(toys.Model, "taylor_seer", calls)
        given = fastcache.enable(target := toys.Model(), toys.config("taylor_seer"), backend=name)
        asked = toys.run(given, target, calls)
        for a, b, c in zip(expected, forced, asked, strict=True):
            assert torch.allclose(a, b, atol=1e-6) and torch.equal(b, c)
    with pytest.raises(ValueError, match="backend"), fastcache.backend("nonsense"):
        pass


# --- plain models of every shape ----------------------------------------------------------------


class Counted:
    """How often each module ran, by forward hooks of the user's own."""

    def __init__(self, target: nn.Module) -> None:
        self.count: dict[str, int] = {}
        for name, module in target.named_modules():
            module.register_forward_hook(self._note(name))

    def _note(self, name: str):
        def hook(*_: Any) -> None:
            self.count[name] = self.count.get(name, 0) + 1

        return hook

    def of(self, name: str) -> int:
        return self.count.get(name, 0)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("shape", toys.SHAPES)
def test_models_of_every_shape_run_without_an_adapter(shape, method):
    target, calls = toys.model(shape), toys.inputs(text=toys.SHAPES[shape][1])
    expected = toys.plain(target, calls)
    before = toys.snapshot(target)
    cache, _, clock = enabled(method, target)
    outputs = toys.run(cache, target, calls, clock)
    strip = toys.actions(cache)
    cache.disable()
    assert strip[0] == "C" and "." in strip
    after = next(i for i, a in enumerate(strip) if a == ".")
    assert equal(outputs[:after], expected[:after])  # exact until the first reuse
    assert not torch.equal(outputs[after], expected[after])
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert (a - b).abs().max() < 0.7 * b.abs().max(), f"step {i}"
    assert toys.snapshot(target) == before
    assert equal(toys.plain(target, calls), expected)


def oracle(target: toys.Model, calls: list[dict], strip: str, head: int, text_too: bool):
    """The stack rule written out: blocks from `head` on are replaced by their last residual."""
    lists = [b for name in target.lists for b in getattr(target, name)]
    outputs, kept = [], None
    for call, action in zip(calls, strip, strict=True):
        hidden = target.embed(call["hidden_states"])
        t = call["timestep"].reshape(-1)
        hidden = hidden + 0.1 * torch.sin(t / 300).reshape(-1, 1, 1)
        streams = [hidden, call.get("encoder_hidden_states")]

        def go(blocks, streams):
            for block in blocks:
                out = target._call(block, streams[0].clone(), streams[1])
                if target.streams == "h":
                    streams = [out, streams[1]]
                elif target.streams == "(h)":
                    streams = [out[0], streams[1]]
                else:
                    streams = list(out[:2]) if target.streams == "he" else [out[1], out[0]]
            return streams

        entry = go(lists[:head], streams)
        if action == "C":
            streams = go(lists[head:], entry)
            kept = [
                None if out is None or x is None else out - x
                for out, x in zip(streams, entry, strict=True)
            ]
        else:
            streams = [entry[0] + kept[0], entry[1]]
            if text_too and entry[1] is not None:
                streams[1] = entry[1] + kept[1]
        hidden, text = streams
        if text is not None and "e" in target.streams:
            hidden = hidden + 0.5 * text.mean(1, keepdim=True)
        outputs.append(target.proj_out(hidden))
    return outputs


STREAMS = [(shape, length) for shape in toys.SHAPES for length in (toys.TEXT, toys.TOKENS)]


@pytest.mark.parametrize("method", STACKS)
@pytest.mark.parametrize(
    "shape, length", [s for s in STREAMS if toys.SHAPES[s[0]][1] or s[1] == toys.TEXT]
)
def test_a_reused_step_adds_the_last_residual_of_both_streams(shape, length, method, monkeypatch):
    """With a text as long as the latents the order of a returned tuple cannot be seen from shapes."""
    text = toys.SHAPES[shape][1]
    monkeypatch.setattr(toys, "TEXT", length)
    target, calls = toys.model(shape), toys.inputs(text=text)
    cache, _, clock = enabled(method, target)
    outputs = toys.run(cache, target, calls, clock)
    strip = toys.actions(cache)
    cache.disable()
    expected = oracle(target, calls, strip, head=int(method == "first_block"), text_too=True)
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.allclose(a, b, atol=2e-5), f"step {i} of {strip}"


@pytest.mark.parametrize("shape, length", STREAMS)
def test_the_change_is_that_of_the_stream_which_the_latents_take(shape, length, monkeypatch):
    """By hand: the first block's residual against that of the last computed step, from the step after the first."""
    text = toys.SHAPES[shape][1]
    monkeypatch.setattr(toys, "TEXT", length)
    target, calls = toys.model(shape), toys.inputs(text=text)
    seen: list[list[Tensor]] = []
    target.embed.register_forward_hook(lambda m, a, out: seen.append([out.detach().clone()]))
    block = getattr(target, target.lists[0])[0]

    def look(module, args, kwargs, out):
        if isinstance(out, tuple):
            out = out[1] if target.streams == "eh" else out[0]
        seen[-1].append(out.detach().clone())

    block.register_forward_hook(look, with_kwargs=True)
    cache, _, clock = enabled("first_block", target)
    toys.run(cache, target, calls, clock)
    reference = None
    for record, call, (embedded, hidden) in zip(cache.stats, calls, seen, strict=True):
        t = call["timestep"].reshape(-1, 1, 1)
        residual = hidden - (embedded + 0.1 * torch.sin(t / 300))
        if reference is not None:
            change = float((residual - reference).abs().mean() / reference.abs().mean())
            assert record.signal == pytest.approx(change, rel=1e-3), record
        reference = residual if record.action == COMPUTE else reference


@pytest.mark.parametrize("method", EVERY)
def test_users_own_hooks_see_the_modules_that_run(method):
    cache, target, clock = enabled(method)
    counted = Counted(target)
    calls = toys.inputs_for(method)
    toys.run(cache, target, calls, clock)
    records = list(cache.stats)
    assert counted.of("") == len(calls)
    if method in STACKS:
        full = sum(r.action == COMPUTE for r in records)
        assert counted.of("blocks.1") == counted.of("blocks.2") == full < len(calls)
        assert counted.of("blocks.0") == (len(calls) if method == "first_block" else full)
    else:
        attention = sum(r.actions[-1] == COMPUTE for r in records)
        assert counted.of("blocks.1.attn.to_q") == attention < len(calls)
        assert counted.of("blocks.1") == len(calls)


@pytest.mark.parametrize("method", EVERY)
def test_an_output_hook_of_the_users_own_changes_the_result(method):
    """Hooks do not only fire: what they return is what the next module gets."""
    name = "blocks.1.attn.to_q" if method not in STACKS else "blocks.1.ff"
    calls, outputs = toys.inputs_for(method), []
    for hooked in (False, True):
        cache, target, clock = enabled(method)
        if hooked:
            target.get_submodule(name).register_forward_hook(lambda m, a, out: out * 0.5)
        outputs.append(toys.run(cache, target, calls, clock)[0])
    assert not torch.equal(*outputs)


def test_dict_and_list_arguments_pass_through():
    class Fancy(toys.Model):
        def forward(self, hidden_states, timestep=None, joint_kwargs=None, sizes=()):
            hidden = self.embed(hidden_states)
            for block in self.blocks:
                hidden = block(**{"hidden_states": hidden, **(joint_kwargs or {})})
            return (self.proj_out(hidden), {"sizes": list(sizes)})

    for method in PLAIN:
        cache, target, clock = enabled(method, Fancy())
        for call in toys.inputs():
            clock.now = float(call["timestep"][0])
            out, more = target(**call, joint_kwargs={"scale": 0.5}, sizes=[1, 2])
            assert more == {"sizes": [1, 2]} and out.shape == (2, toys.TOKENS, 4)
        assert "." in toys.actions(cache)


def test_the_model_may_call_itself_and_modules_may_be_called_alone():
    _cache, target, _clock = enabled("mag_cache")
    hidden = torch.randn(2, toys.TOKENS, toys.DIM)
    assert torch.equal(target.blocks[0](hidden), copy.deepcopy(toys.Model()).blocks[0](hidden))
    assert len(list(target.blocks)) == 3 and isinstance(target.blocks[1], toys.Block)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_give_the_same_run(method, mode):
    """F8: nothing is stored with its graph, and buffers made in one mode serve the other."""
    calls = toys.inputs()
    expected = toys.alone(toys.Model, method, calls)
    target = toys.Model().requires_grad_(True)
    cache, _, clock = enabled(method, target)
    outputs = []
    for call in calls:
        clock.now = float(call["timestep"][0])
        with mode(), cache.context():
            outputs.append(target(**call).detach())
    assert equal(outputs, expected)
    held = [t for d in cache.denoisers for s in d.pool.states.values() for t in tensors_of(s)]
    assert held and not any(t.requires_grad or t.grad_fn is not None for t in held)


def tensors_of(state: Any) -> list[Tensor]:
    """Every tensor that a state holds."""
    units = [u for rule in state.units for u in rule.values()]
    found = [t for u in units for stream in u.streams for t in stream.tensors()]
    return found + [t for group in state.slots for t in group.tensors()]


def test_training_mode_with_gradients_is_refused():
    _cache, target, _clock = enabled("mag_cache", toys.Model().requires_grad_(True).train())
    with pytest.raises(ValueError, match=r"target.*training"):
        target(**toys.inputs()[0])
    with torch.no_grad():
        assert target(**toys.inputs()[0]).shape == (2, toys.TOKENS, 4)


@pytest.mark.parametrize("method", PLAIN)
def test_a_consumer_may_write_into_what_a_reused_module_returned(method):
    """F9: upstream hands out the cached object itself, and an in-place consumer corrupts it."""

    class Writer(toys.Block):
        def change(self, hidden_states, encoder_hidden_states=None):
            return self.attn(hidden_states).mul_(0.5).add_(1.0) + 0.3 * torch.tanh(
                self.ff(hidden_states)
            )

    class Reader(Writer):
        def change(self, hidden_states, encoder_hidden_states=None):
            return self.attn(hidden_states).mul(0.5).add(1.0) + 0.3 * torch.tanh(
                self.ff(hidden_states)
            )

    calls, runs = toys.inputs(), {}
    changes = {"spatial_attention_block_skip_range": 4} if method == "pyramid" else {}
    for block in (Writer, Reader):
        cache, target, clock = enabled(method, toys.Model(block=block), **changes)
        for _ in range(2):  # what the first run has learned holds for the next one
            outputs = toys.run(cache, target, calls, clock)
        runs[block] = outputs, toys.actions(cache)[toys.STEPS :]
    (written, strip), (read, expected) = runs[Writer], runs[Reader]
    assert strip == expected and "." in strip
    for i, (a, b) in enumerate(zip(written, read, strict=True)):
        assert torch.allclose(a, b, atol=1e-6), f"step {i}"


PREDICTORS = [fastcache.Reuse(), fastcache.Extrapolate(), fastcache.Taylor(1)]


@pytest.mark.parametrize("what", PREDICTORS, ids=lambda what: type(what).__name__)
def test_what_the_model_returns_is_the_callers_to_keep(what):
    """Also where the last module is the one that is skipped: a solver of several steps keeps old outputs."""
    target, kept = toys.Model(), []
    where = fastcache.Modules(("proj_out",), kind="any")
    recipe = fastcache.Recipe(fastcache.Interval(3, warmup=1), what, where)
    with fastcache.enable(target, recipe) as cache:
        for call in toys.inputs():
            with cache.context("default"):
                output = toys.step(target, call)
            kept.append((output, output.clone()))
        assert {"C", "."} == set(toys.actions(cache))
    assert all(torch.equal(output, then) for output, then in kept)


@pytest.mark.parametrize("what", PREDICTORS, ids=lambda what: type(what).__name__)
def test_a_hook_may_keep_what_a_skipped_module_returned(what):
    target, kept = toys.Model(), []
    recipe = fastcache.Recipe(fastcache.Interval(3, warmup=1), what, fastcache.Modules(("attn",)))
    with fastcache.enable(target, recipe) as cache:
        for module in target.modules():
            if isinstance(module, toys.Attention):
                module.register_forward_hook(lambda m, given, out: kept.append((out, out.clone())))
        toys.run(cache, target, toys.inputs())
    assert kept and all(torch.equal(output, then) for output, then in kept)


@pytest.mark.parametrize("what", PREDICTORS, ids=lambda what: type(what).__name__)
def test_a_stored_value_and_what_it_was_copied_from_are_not_both_kept(what):
    """Peak memory: a block holds what its attention returned until it ends."""
    alive = []

    class Own(toys.Attention):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            self.last = weakref.ref(output)
            return output

    class Watching(toys.Block):
        def __init__(self):
            super().__init__()
            self.attn = Own()

        def change(self, hidden_states, encoder_hidden_states=None):
            output = self.attn(hidden_states)
            alive.append(self.attn.last() is not None)
            return output

    target = toys.Model(block=Watching)
    recipe = fastcache.Recipe(fastcache.Interval(3, warmup=1), what, fastcache.Modules(("attn",)))
    with fastcache.enable(target, recipe) as cache:
        toys.run(cache, target, toys.inputs())
        assert {"C", "."} == set(toys.actions(cache))
    assert alive and not any(alive)


# --- exactness ----------------------------------------------------------------------------------


ALL_COMPUTE = {
    "first_block": {"threshold": 0.0},
    "mag_cache": {"threshold": 0.0, "mag_ratios": [1.5] * toys.STEPS},
    "taylor_seer": {"cache_interval": 1},
    "pyramid": {"spatial_attention_block_skip_range": 1},
    "faster": {"spatial_attention_block_skip_range": 1},
    "faster_guided": {"spatial_attention_block_skip_range": 1, "unconditional_batch_skip_range": 1},
}


@pytest.mark.parametrize("method", EVERY)
def test_a_config_that_never_reuses_is_bit_identical(method):
    target, calls = toys.build(method), toys.inputs_for(method)
    expected = toys.plain(target, calls)
    cache, _, clock = enabled(method, target, **ALL_COMPUTE[method])
    assert equal(toys.run(cache, target, calls, clock), expected)
    assert set(toys.actions(cache)) == {"C"}


@pytest.mark.parametrize("where", [fastcache.Stack(), fastcache.Modules(("attn",))])
@pytest.mark.parametrize("what", [fastcache.Reuse(), fastcache.Taylor(2)])
@pytest.mark.parametrize("shape", ["tensor", "(encoder, hidden)", "in place", "extra returns"])
def test_an_all_compute_mask_is_bit_identical(shape, what, where):
    target, calls = toys.model(shape), toys.inputs(text=toys.SHAPES[shape][1])
    expected = toys.plain(target, calls)
    recipe = fastcache.Recipe(fastcache.Mask([True] * toys.STEPS), what, where)
    with fastcache.enable(target, recipe) as cache:
        assert equal(toys.run(cache, target, calls), expected)
        assert len(list(cache.stats)) == len(calls)


def test_a_mask_computes_exactly_its_steps():
    mask = [1, 1, 0, 0, 1, 0, 1, 0, 0, 0]
    target = toys.Model()
    with fastcache.enable(target, fastcache.Recipe(fastcache.Mask(mask))) as cache:
        toys.run(cache, target, toys.inputs())
        assert [int(a == "C") for a in toys.actions(cache)] == mask


# --- stats, summary, plot -----------------------------------------------------------------------


def test_stats_have_the_promised_fields():
    cache, target, clock = enabled("first_block")
    toys.run(cache, target, toys.inputs(), clock, name="cond", request="r7")
    records = list(cache.stats)
    assert len(records) == toys.STEPS == len(list(iter(cache.stats)))
    for i, record in enumerate(records):
        assert (record.request, record.context, record.step) == ("r7", "cond", i)
        assert record.action in ("compute", "reuse") == (COMPUTE, REUSE)
        assert record.threshold == 0.08
        assert (record.signal is None) == (i == 0)
        if i:
            assert (record.action == REUSE) == (record.signal <= record.threshold)


@pytest.mark.parametrize("method", EVERY)
def test_summary_says_what_is_hooked_and_what_happened(method):
    cache, target, clock = enabled(method)
    assert "no denoiser call" in cache.summary()
    toys.run(cache, target, toys.inputs_for(method), clock)
    text = cache.summary()
    assert (type(cache.config).__name__ in text and "reused" in text and "cond" in text) or method
    assert f"{len(list(cache.stats))} denoiser calls" in text
    cache.disable()
    assert isinstance(cache.summary(), str)


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    cache, target, clock = enabled("first_block")
    toys.run(cache, target, toys.inputs(), clock)
    path = tmp_path / "run.png"
    cache.plot(path)
    assert path.read_bytes()[:4] == b"\x89PNG"


# --- contexts -----------------------------------------------------------------------------------


def test_contexts_nest_and_the_outer_one_is_restored():
    """F7: upstream's inner exit clears the outer context."""
    cache, target, _clock = enabled("mag_cache")
    call = toys.inputs()[0]
    with cache.context("outer", request="a"):
        toys.step(target, call)
        with cache.context("inner"):
            toys.step(target, call)
            with cache.context("third", request="a"):
                toys.step(target, call)
        toys.step(target, toys.inputs()[1])
    toys.step(target, call)
    seen = [(r.request, r.context, r.step) for r in cache.stats]
    assert seen == [
        ("a", "outer", 0), (0, "inner", 0), ("a", "third", 0), ("a", "outer", 1), (0, "default", 0),
    ]  # fmt: skip


def test_contexts_of_two_caches_do_not_mix():
    one, a, _ = enabled("mag_cache")
    two, b, _ = enabled("mag_cache")
    with one.context("one"), two.context("two"):
        toys.step(a, toys.inputs()[0])
        toys.step(b, toys.inputs()[0])
    assert [r.context for r in one.stats] == ["one"] and [r.context for r in two.stats] == ["two"]


@pytest.mark.parametrize("method", EVERY)
def test_a_name_alone_is_enough_for_a_whole_run_and_the_next(method):
    cache, target, clock = enabled(method)
    calls = toys.inputs_for(method)
    first = toys.run(cache, target, calls, clock, name="cond")
    second = toys.run(cache, target, calls, clock, name="cond")
    strip = toys.actions(cache)
    assert strip[: len(calls)] == strip[len(calls) :] and "." in strip
    assert equal(first, second)
    assert [r.step for r in cache.stats] == [*range(len(calls))] * 2


@pytest.mark.parametrize("method", EVERY)
def test_no_context_at_all_works_too(method):
    """F2: pipelines that open no context."""
    calls = toys.inputs_for(method)
    cache, target, clock = enabled(method)
    outputs = [toys.step(target, call, clock) for call in calls]
    assert equal(outputs, toys.alone(lambda: toys.build(method), method, calls))
    assert {r.context for r in cache.stats} == {"default"}


@pytest.mark.parametrize("method", PLAIN)
def test_sequential_guidance_without_contexts_never_mixes_its_branches(method):
    """F2: a second call at the same step is another branch."""

    def build() -> toys.Model:
        return toys.model("text optional, given")

    cond = toys.inputs(text=True)
    uncond = [{**c, "encoder_hidden_states": -c["encoder_hidden_states"]} for c in cond]
    _cache, target, clock = enabled(method, build())
    outputs: list[list[Tensor]] = [[], []]
    for pair in zip(cond, uncond, strict=True):
        for branch, call in enumerate(pair):
            outputs[branch].append(toys.step(target, call, clock))
    assert equal(outputs[0], toys.alone(build, method, cond))
    assert equal(outputs[1], toys.alone(build, method, uncond))
    again = [toys.step(target, call, clock) for call in cond]
    assert equal(again, outputs[0])


def test_a_step_index_decides():
    cache, target, _clock = enabled("taylor_seer")
    for i, call in enumerate(toys.inputs()):
        with cache.context("cond", step_index=i, num_inference_steps=toys.STEPS):
            toys.step(target, call)
    plan = toys.config("taylor_seer").recipe().plan(toys.STEPS)
    assert tuple(r.action for r in cache.stats) == plan.actions
    assert [r.step for r in cache.stats] == list(range(toys.STEPS))
    for index in (0, 5, 3):
        with cache.context("other", step_index=index):
            toys.step(target, toys.inputs()[index])
    assert [r.step for r in cache.stats][-3:] == [0, 5, 3]


def test_a_second_call_at_the_same_step_index_is_refused():
    cache, target, _clock = enabled("mag_cache")
    calls = toys.inputs()
    for i in (0, 1):
        with cache.context(step_index=i):
            toys.step(target, calls[i])
    with pytest.raises(ValueError, match="step_index"), cache.context(step_index=1):
        toys.step(target, calls[1])


def test_num_inference_steps_of_the_context_beats_the_configs():
    """F5: ratios are resampled for the actual count."""
    target, calls = toys.Model(), toys.inputs(6)
    cache, _, _clock = enabled("mag_cache", target)
    toys.run(cache, target, calls, num_inference_steps=6)
    expected = toys.config("mag_cache", num_inference_steps=6).recipe().plan(6).actions
    assert tuple(r.action for r in cache.stats) == expected


def test_steps_past_the_table_compute_and_warn_once():
    cache, target, _clock = enabled("mag_cache", mag_ratios=[1.0] * 4, num_inference_steps=4)
    calls = toys.inputs(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, call in enumerate(calls):
            with cache.context(step_index=i):
                toys.step(target, call)
    assert toys.actions(cache)[4:] == "CCCC"
    assert len([w for w in caught if "num_inference_steps" in str(w.message)]) == 1


def test_timestep_and_sigma_may_be_tensors():
    cache, target, _clock = enabled("mag_cache")
    with cache.context(timestep=torch.tensor([900, 900]), sigma=torch.tensor(0.9), step_index=0):
        toys.step(target, toys.inputs()[0])
    assert next(iter(cache.stats)).timestep == 900.0


# --- runs begin ---------------------------------------------------------------------------------


def restart_reset(cache, target, calls, clock):
    cache.reset()
    return {}


def restart_reset_request(cache, target, calls, clock):
    cache.reset(request=0)
    return {}


def restart_nothing(cache, target, calls, clock):
    return {}


def restart_error(cache, target, calls, clock):
    handle = target.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="mine"), cache.context("cond"):
        toys.step(target, calls[6])
    handle.remove()
    return {}


def restart_error_outside_the_model(cache, target, calls, clock):
    with pytest.raises(KeyError, match="mine"), cache.context("cond"):
        raise KeyError("mine")
    return {}


def fail(*_: Any) -> None:
    raise KeyError("mine")


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(
    "restart",
    [
        restart_reset,
        restart_reset_request,
        restart_nothing,
        restart_error,
        restart_error_outside_the_model,
    ],
)
def test_a_new_run_equals_a_fresh_one(method, restart):
    """The first run stops half way; the timestep of the next call is back at its start."""
    calls, other = toys.inputs_for(method), toys.inputs_for(method, seed=5)
    cache, target, clock = enabled(method)
    toys.run(cache, target, other[:6], clock, name="cond")
    restart(cache, target, calls, clock)
    outputs = toys.run(cache, target, calls, clock, name="cond")
    assert equal(outputs, toys.alone(lambda: toys.build(method), method, calls))


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("change", ["batch", "tokens", "dtype"])
def test_a_change_of_shape_or_dtype_begins_a_run(method, change):
    """F4: upstream broadcasts, or returns its input without a residual."""
    calls = toys.inputs_for(method)
    before = [dict(c) for c in toys.inputs_for(method, seed=5)]
    target = toys.build(method)
    for call in before:
        for key, value in call.items():
            if change == "batch":
                call[key] = torch.cat([value, value])
            elif change == "dtype":
                call[key] = value.double()
        if change == "tokens":
            call["hidden_states"] = torch.cat(
                [call["hidden_states"]] * 2, dim=-1 if method == "faster_guided" else 1
            )
    if change == "dtype":
        target.double()
    before = before[:4]
    cache, _, clock = enabled(method, target)
    late = calls[4:]  # timesteps go on falling: the shape alone tells
    if change == "dtype":
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            target.float()
            with cache.context():
                toys.step(target, before[0])
        target.double()
        before = [{k: v.float() for k, v in c.items()} for c in before]
        target.float()
        toys.run(cache, target, before, clock)
        target.to(torch.bfloat16)
        late = [{k: v.bfloat16() for k, v in c.items()} for c in late]
        outputs = toys.run(cache, target, late, clock)
        fresh = toys.alone(lambda: toys.build(method).to(torch.bfloat16), method, late)
    else:
        toys.run(cache, target, before, clock)
        outputs = toys.run(cache, target, late, clock)
        fresh = toys.alone(lambda: toys.build(method), method, late)
    assert equal(outputs, fresh)
    assert [o.shape[0] for o in outputs] == [len(c["hidden_states"]) for c in late]
    assert [r.step for r in cache.stats][-len(late) :] == list(range(len(late)))


def test_a_shape_inside_a_list_counts_too():
    class Listed(toys.Model):
        def forward(self, latents, timestep=None):
            return super().forward(torch.stack(latents), timestep)

    target = Listed()
    cache, _, _ = enabled("mag_cache", target)
    for tokens in (6, 6, 4):
        with cache.context("x"):
            target([torch.randn(tokens, 4)] * 2)
    assert [r.step for r in cache.stats] == [0, 1, 0]


@pytest.mark.parametrize("method", EVERY)
def test_a_step_index_that_goes_back_begins_a_run(method):
    calls, other = toys.inputs_for(method), toys.inputs_for(method, seed=5)
    cache, target, clock = enabled(method)

    def run(inputs, upto):
        outputs = []
        for i in range(upto):
            clock.now = float(inputs[i]["timestep"][0])
            with cache.context("cond", step_index=i, num_inference_steps=toys.STEPS):
                outputs.append(toys.step(target, {**inputs[i], "timestep": torch.tensor([5.0])}))
        return outputs

    run(other, 6)
    second = run(calls, toys.STEPS)
    cache.disable()
    cache, target, clock = enabled(method)
    assert equal(second, run(calls, toys.STEPS))


def test_the_timestep_of_the_callback_begins_runs_of_a_model_without_one():
    class Timeless(toys.Model):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    cache, target, clock = enabled("pyramid", Timeless())
    calls = toys.inputs()
    runs = []
    for _ in range(2):
        outputs = []
        for call in calls:
            clock.now = float(call["timestep"][0])
            with cache.context("cond"):
                outputs.append(toys.step(target, {"hidden_states": call["hidden_states"]}))
        runs.append(outputs)
    assert equal(*runs) and [r.step for r in cache.stats] == [*range(toys.STEPS)] * 2


def test_timesteps_that_rise_within_runs_are_learned():
    """Some models count time upwards: after a few single steps runs are whole again."""
    cache, target, _clock = enabled("mag_cache")
    calls = toys.inputs()
    for call in calls:
        call["timestep"] = 1000 - call["timestep"]
    for _ in range(3):
        toys.run(cache, target, calls)
    assert [r.step for r in cache.stats][toys.STEPS :] == [*range(toys.STEPS)] * 2


def test_single_steps_of_several_requests_do_not_turn_time_around():
    cache, target, _clock = enabled("mag_cache")
    call = toys.inputs()[0]
    for t in (500.0, 700.0):
        for request in "ab":
            with cache.context(request=request):
                toys.step(target, {**call, "timestep": torch.tensor([t])})
    assert [r.step for r in cache.stats] == [0, 0, 0, 0]


@pytest.mark.parametrize("method", EVERY)
def test_an_exception_makes_all_contexts_of_its_request_fresh_and_no_other(method):
    calls = toys.inputs_for(method)
    cache, target, clock = enabled(method)
    for name, request in (("a", 1), ("b", 1), ("a", 2)):
        toys.run(cache, target, calls[:4], clock, name=name, request=request)
    handle = target.proj_out.register_forward_hook(fail)
    clock.now = float(calls[4]["timestep"][0])
    with pytest.raises(KeyError, match="mine"), cache.context("a", request=1):
        toys.step(target, calls[4])
    handle.remove()
    before = len(list(cache.stats))
    clock.now = float(calls[5]["timestep"][0])
    for name, request in (("a", 1), ("b", 1), ("a", 2)):
        with cache.context(name, request=request):
            toys.step(target, calls[5])
    assert [r.step for r in list(cache.stats)[before:]] == [0, 0, 4]


def test_an_exception_makes_all_denoisers_fresh():
    pipe = Pipe(toys.Model(), toys.Model(seed=1))
    cache = fastcache.enable(pipe, toys.config("mag_cache"))
    for model in (pipe.transformer, pipe.transformer_2):
        for call in toys.inputs()[:3]:
            toys.step(model, call)
    handle = pipe.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(KeyError):
        toys.step(pipe.transformer, toys.inputs()[3])
    handle.remove()
    toys.step(pipe.transformer_2, toys.inputs()[4])
    assert [r.step for r in cache.stats][-1] == 0


def test_an_error_while_a_call_is_prepared_makes_the_request_fresh_too():
    broken: list[int] = []
    clock, target = toys.Clock(), toys.build("pyramid")
    config = toys.config("pyramid", current_timestep_callback=lambda: fail() if broken else clock())
    cache = fastcache.enable(target, config)
    calls = toys.inputs()
    toys.run(cache, target, calls[:4], clock)
    broken.append(1)
    with pytest.raises(KeyError, match="mine"):
        toys.step(target, calls[4])
    broken.clear()
    toys.step(target, calls[5], clock)
    assert [r.step for r in cache.stats][-1] == 0


@pytest.mark.parametrize("method", EVERY)
def test_nothing_survives_a_reset_not_even_nan(method):
    calls = toys.inputs_for(method)
    cache, target, clock = enabled(method)
    poisoned = [{**c, "hidden_states": c["hidden_states"] * math.nan} for c in calls]
    toys.run(cache, target, poisoned, clock)
    held = [t for d in cache.denoisers for s in d.pool.states.values() for t in tensors_of(s)]
    assert any(torch.isnan(t).any() for t in held)
    cache.reset()
    states = [s for d in cache.denoisers for s in (*d.pool.states.values(), *d.pool.spares)]
    assert not any(t.any() for s in states for t in tensors_of(s)), "a buffer kept its values"
    outputs = toys.run(cache, target, calls, clock)
    assert equal(outputs, toys.alone(lambda: toys.build(method), method, calls))


def test_a_reset_forgets_one_request_or_all():
    cache, target, _clock = enabled("mag_cache")
    calls = toys.inputs()

    def steps_after(*reset):
        for request in (1, 2):
            toys.run(cache, target, calls[:3], request=request)
        cache.reset(*reset)
        for request in (1, 2):
            with cache.context(request=request):
                toys.step(target, calls[5])
        found = [r.step for r in cache.stats][-2:]
        cache.reset()
        return found

    assert steps_after(1) == [0, 3]
    assert steps_after(2) == [3, 0]
    assert steps_after() == steps_after(None) == [0, 0]
    cache.reset(request="never seen")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_computes(value):
    """F21: upstream compares NaN with `>` and skips."""
    cache, target, clock = enabled("first_block", threshold=math.inf)
    calls = toys.inputs()
    calls[3] = {**calls[3], "hidden_states": calls[3]["hidden_states"] * value}
    outputs = toys.run(cache, target, calls, clock)
    strip = toys.actions(cache)
    assert strip[:4] == "C..C"
    assert strip[4] == "C", "a residual that is not finite is no reference"
    assert strip[5:] == "....." and all(torch.isfinite(o).all() for o in outputs[4:])


def test_a_block_that_changes_nothing_computes():
    """0/0 is no reason to skip."""

    class Idle(toys.Block):
        def forward(self, hidden_states):
            return hidden_states.clone()

    target = toys.Model()
    target.blocks[0] = Idle().requires_grad_(False)
    cache, _, _ = enabled("first_block", target, threshold=10.0)
    toys.run(cache, target, toys.inputs())
    assert set(toys.actions(cache)) == {"C"}


# --- independence -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLAIN)
def test_two_sequential_contexts_equal_two_models(method):
    """F1: upstream's PAB returns cond attention to every uncond call."""

    def build() -> toys.Model:
        return toys.model("text optional, given")

    cond = toys.inputs(text=True)
    uncond = [{**c, "encoder_hidden_states": -c["encoder_hidden_states"]} for c in cond]
    cache, target, clock = enabled(method, build())
    outputs: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    for a, b in zip(cond, uncond, strict=True):
        for name, call in (("cond", a), ("uncond", b)):
            outputs[name] += toys.run(cache, target, [call], clock, name=name)
    assert equal(outputs["cond"], toys.alone(build, method, cond))
    assert equal(outputs["uncond"], toys.alone(build, method, uncond))
    assert not torch.equal(outputs["cond"][5], outputs["uncond"][5])


def test_two_batched_contexts_equal_two_models_with_guidance():
    method = "faster_guided"
    runs = {"a": toys.inputs_for(method), "b": toys.inputs_for(method, seed=3)}
    cache, target, clock = enabled(method)
    outputs: dict[str, list[Tensor]] = {"a": [], "b": []}
    for i in range(toys.STEPS):
        for name, calls in runs.items():
            outputs[name] += toys.run(cache, target, [calls[i]], clock, name=name)
    for name, calls in runs.items():
        assert equal(outputs[name], toys.alone(lambda: toys.build(method), method, calls))


@pytest.mark.parametrize("method", EVERY)
def test_two_interleaved_requests_equal_two_alone(method):
    """Different inputs, different moments: request b starts three steps after a."""
    a, b = toys.inputs_for(method), toys.inputs_for(method, seed=3)
    cache, target, clock = enabled(method)
    outputs: dict[str, list[Tensor]] = {"a": [], "b": []}
    for i in range(toys.STEPS + 3):
        if i < toys.STEPS:
            outputs["a"] += toys.run(cache, target, [a[i]], clock, request="a")
        if i >= 3:
            outputs["b"] += toys.run(cache, target, [b[i - 3]], clock, request="b")
    assert equal(outputs["a"], toys.alone(lambda: toys.build(method), method, a))
    assert equal(outputs["b"], toys.alone(lambda: toys.build(method), method, b))


def test_guidance_that_runs_sequentially_is_not_taken_for_a_batch():
    """F29: upstream takes two samples of one branch for its two halves."""
    calls = toys.inputs_for("faster_guided")
    cache, target, clock = enabled("faster_guided")
    toys.run(cache, target, calls[:1], clock, name="cond")
    with pytest.raises(ValueError, match="one call per branch"):
        toys.run(cache, target, calls[:1], clock, name="uncond")
    outputs = toys.run(cache, target, calls, clock, name="cond")  # a name alone says nothing
    assert equal(outputs, toys.alone(lambda: toys.build("faster_guided"), "faster_guided", calls))
    cache, target, clock = enabled("faster_guided")
    other = {**calls[0], "encoder_hidden_states": -calls[0]["encoder_hidden_states"]}
    toys.step(target, calls[0], clock)
    with pytest.raises(ValueError, match="sequentially"):
        toys.step(target, other, clock)


def test_an_odd_batch_is_refused_by_the_guidance_half():
    calls = [{k: v[:3] for k, v in c.items()} for c in toys.inputs_for("faster_guided")]
    cache, target, clock = enabled("faster_guided")
    with pytest.raises(ValueError, match=r"batch"):
        toys.run(cache, target, calls, clock, name="cond_uncond")


# --- enabling, disabling, restoring -------------------------------------------------------------


class Pipe:
    """A pipeline as far as fastcache cares."""

    def __init__(self, *denoisers: nn.Module) -> None:
        for name, model in zip(("transformer", "transformer_2"), denoisers, strict=False):
            setattr(self, name, model)

    current_timestep = 1000.0


@pytest.mark.parametrize("method", EVERY)
def test_disable_restores_everything_and_again_does_nothing(method):
    target = toys.build(method)
    target.blocks[0].register_forward_hook(lambda *_: None)
    target.forward = target.forward  # an instance attribute, as hook libraries leave them
    target.blocks[1].attn.forward = target.blocks[1].attn.forward
    before = toys.snapshot(target)
    calls = toys.inputs_for(method)
    expected = toys.plain(target, calls)
    cache, _, clock = enabled(method, target)
    assert toys.snapshot(target) != before
    assert list(target.state_dict()) == before[""], "keys stay while enabled"
    toys.run(cache, target, calls, clock)
    cache.disable()
    assert toys.snapshot(target) == before
    cache.disable()
    assert toys.snapshot(target) == before
    assert equal(toys.plain(target, calls), expected)
    with pytest.raises(ValueError, match="enable"):
        cache.update(toys.config(method))
    assert toys.snapshot(target) == before


def test_disable_frees_what_was_cached():
    cache, target, clock = enabled("taylor_seer")
    toys.run(cache, target, toys.inputs(), clock)
    held = [
        weakref.ref(t)
        for d in cache.denoisers
        for s in d.pool.states.values()
        for t in tensors_of(s)
    ]
    assert held and cache.nbytes() > 0
    cache.disable()
    gc.collect()
    assert not any(r() is not None for r in held) and cache.nbytes() == 0


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_the_with_statement_disables(error):
    target = toys.Model()
    before = toys.snapshot(target)
    try:
        with fastcache.enable(target, toys.config("mag_cache")) as cache:
            assert isinstance(cache, fastcache.Cache) and cache.enabled
            toys.step(target, toys.inputs()[0])
            if error:
                raise error("mine")
    except BaseException as caught:
        assert type(caught) is error
    assert not cache.enabled and toys.snapshot(target) == before


def test_a_second_enable_says_so_and_changes_nothing():
    cache, target, _clock = enabled("mag_cache")
    toys.run(cache, target, toys.inputs()[:3])
    before = toys.snapshot(target)
    for again in (target, Pipe(target), Pipe(toys.Model(), target)):
        with pytest.raises(ValueError, match="already enabled"):
            fastcache.enable(again, toys.config("first_block"))
    assert toys.snapshot(target) == before
    toys.run(cache, target, toys.inputs()[3:])
    assert [r.step for r in cache.stats] == list(range(toys.STEPS))
    cache.disable()
    fastcache.enable(target, toys.config("first_block")).disable()


@pytest.mark.parametrize("method", EVERY)
def test_update_changes_the_settings(method):
    calls = toys.inputs_for(method)
    target = toys.build(method)
    before = toys.snapshot(target)
    cache, _, clock = enabled(method, target, **ALL_COMPUTE[method])
    toys.run(cache, target, calls[:5], clock)
    given = toys.config(method, clock)
    cache.update(given)
    outputs = toys.run(cache, target, calls, clock)
    assert equal(outputs, toys.alone(lambda: toys.build(method), method, calls))
    assert type(cache.config) is type(given)
    cache.disable()
    assert toys.snapshot(target) == before


def test_an_update_that_fails_keeps_the_old_settings():
    cache, target, _clock = enabled("mag_cache")
    before = toys.snapshot(target)
    absent = fastcache.TaylorSeerCacheConfig(cache_identifiers=["no such module"])
    for bad in (absent, 5, None):
        with pytest.raises((ValueError, TypeError)):
            cache.update(bad)
        assert toys.snapshot(target).keys() == before.keys() and cache.enabled
        assert type(cache.config).__name__ == "MagCacheConfig"
    outputs = toys.run(cache, target, toys.inputs())
    assert equal(outputs, toys.alone(toys.Model, "mag_cache", toys.inputs()))
    cache.disable()
    assert equal(toys.plain(target, toys.inputs()), toys.plain(toys.Model(), toys.inputs()))


class Bare(nn.Module):
    """Nothing to hook at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stages, self.conv = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4)

    def forward(self, hidden_states, timestep=None):
        return self.conv(hidden_states)


class NoAttention(Bare):
    """Blocks, but no attention in them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


NOTHING = [
    ("first_block", Bare, {}, "transformer_blocks"),
    ("mag_cache", Bare, {}, "stages"),
    ("taylor_seer", Bare, {"cache_identifiers": None}, "attn"),
    ("taylor_seer", toys.Model, {"cache_identifiers": [r"blocks\.\d+\.atn"]}, r"blocks\.0\.attn"),
    ("taylor_seer", toys.Model, {"skip_predict_identifiers": ["nope"]}, "nope"),
    ("pyramid", NoAttention, {}, "spatial"),
    ("pyramid", toys.Model, {"cross_attention_block_skip_range": 2,
                             "spatial_attention_block_skip_range": None}, "cross"),
    ("pyramid", toys.Model, {"spatial_attention_block_identifiers": ("bloks",)}, "bloks"),
    ("faster", NoAttention, {"spatial_attention_block_identifiers": ("attn",)}, "attn"),
    ("faster", toys.Model, {"spatial_attention_block_identifiers": ("attention9",)}, "attention9"),
    ("faster_guided", toys.Model, {"spatial_attention_block_identifiers": ("xyz",)}, "xyz"),
]  # fmt: skip


@pytest.mark.parametrize("method, kind, changes, named", NOTHING)
def test_nothing_to_hook_raises_names_it_and_leaves_everything_untouched(
    method, kind, changes, named
):
    """F10, F11: upstream hooks nothing in silence, or half of it."""
    target, good = kind(), toys.model("text optional, given")
    config = toys.config(method, toys.Clock(), **changes)
    for where in (target, Pipe(target), Pipe(good, target), Pipe(target, good)):
        models = [m for m in vars(where).values() if isinstance(m, nn.Module)]
        models = [where] if isinstance(where, nn.Module) else models
        before = [toys.snapshot(m) for m in models]
        with pytest.raises(ValueError, match=named) as caught:
            fastcache.enable(where, config)
        assert "target" in str(caught.value)
        assert [toys.snapshot(m) for m in models] == before


@pytest.mark.parametrize("method", EVERY)
def test_an_enable_that_breaks_half_way_leaves_no_trace(method, monkeypatch):
    """Whatever fails while hooks go in, and after how many, the model is as before."""
    from fastcache import cache

    first, second = toys.build(method), toys.build(method, seed=1)
    before = [toys.snapshot(m) for m in (first, second)]
    original = cache.Denoiser.install
    for fails_at in (0, 1):
        count = [0]

        def install(self, count=count, fails_at=fails_at):
            original(self)
            count[0] += 1
            if count[0] > fails_at:
                raise MemoryError("while hooking")

        monkeypatch.setattr(cache.Denoiser, "install", install)
        with pytest.raises(MemoryError, match="while hooking"):
            fastcache.enable(Pipe(first, second), toys.config(method))
        assert [toys.snapshot(m) for m in (first, second)] == before


def test_a_pipeline_has_all_its_denoisers_hooked():
    pipe = Pipe(toys.Model(), toys.Model(seed=1))
    with fastcache.enable(pipe, toys.config("mag_cache")) as cache:
        for model in (pipe.transformer, pipe.transformer_2):
            toys.run(cache, model, toys.inputs())
        assert toys.actions(cache).count(".") == 2 * 6
        assert set(cache.hooked()) == {"transformer", "transformer_2"}


def test_a_pipeline_gives_the_timestep_itself():
    pipe = Pipe(toys.Model())
    config = fastcache.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)
    with fastcache.enable(pipe, config) as cache:
        for call in toys.inputs():
            pipe.current_timestep = float(call["timestep"][0])
            toys.step(pipe.transformer, call)
        assert "." in toys.actions(cache)


def test_a_block_list_under_another_name_needs_an_adapter():
    target = toys.Model(lists=("stages",))
    with pytest.raises(ValueError, match="stages"):
        fastcache.enable(target, toys.config("mag_cache"))
    with fastcache.enable(
        target, toys.config("mag_cache"), adapter=fastcache.BlockAdapter(blocks=("stages",))
    ) as cache:
        toys.run(cache, target, toys.inputs())
        assert "." in toys.actions(cache)
    with pytest.raises(ValueError, match=r"adapter.*nowhere"):
        fastcache.enable(
            target, toys.config("mag_cache"), adapter=fastcache.BlockAdapter(blocks=("nowhere",))
        )


@pytest.mark.parametrize("usual", fastcache.models.table.LIST_NAMES)
def test_every_usual_list_name_is_found(usual):
    target = toys.Model(lists=(usual,), depth=2)
    with fastcache.enable(target, toys.config("mag_cache")) as cache:
        toys.run(cache, target, toys.inputs())
        assert "." in toys.actions(cache)


def test_identifiers_are_searched_for_broadcast_and_matched_in_full_for_taylor():
    target = toys.Model()
    with fastcache.enable(
        target,
        toys.config("pyramid", spatial_attention_block_identifiers=("s.1.at",)),
    ) as cache:
        assert list(cache.hooked().values()) == [["blocks.1.attn"]]
    with pytest.raises(ValueError, match="cache_identifiers"):
        fastcache.enable(target, toys.config("taylor_seer", cache_identifiers=["s.1.at"]))
    with fastcache.enable(
        target, toys.config("taylor_seer", cache_identifiers=[r"blocks\.1\.ff", "proj_out"])
    ) as cache:
        assert sorted(*cache.hooked().values()) == ["blocks.1.ff", "proj_out"]


# --- configs and plans --------------------------------------------------------------------------


def test_all_ranges_none_warns_and_takes_two_on_a_copy():
    config = fastcache.PyramidAttentionBroadcastConfig(current_timestep_callback=toys.Clock())
    with pytest.warns(UserWarning, match="spatial_attention_block_skip_range=2"):
        cache = fastcache.enable(toys.Model(), config)
    assert config.spatial_attention_block_skip_range is None
    assert cache.recipe.when.n == 2


@pytest.mark.parametrize("method", EVERY)
def test_a_config_is_never_written_to(method):
    config = toys.config(method, toys.Clock())
    before = dict(vars(config))
    cache = fastcache.enable(toys.build(method), config)
    toys.run(cache, cache.target, toys.inputs_for(method), config.timestep_callback)
    assert all(vars(config)[k] is v for k, v in before.items())
    assert cache.config is not config


@pytest.mark.parametrize("method", [m for m in EVERY if m != "first_block"])
def test_the_plan_is_what_happens(method):
    calls = toys.inputs_for(method)
    cache, target, clock = enabled(method)
    toys.run(cache, target, calls, clock)
    times = [float(c["timestep"][0]) for c in calls]
    plan = toys.config(method, clock).recipe().plan(toys.STEPS, times)
    assert plan.actions == tuple(r.action for r in cache.stats)
    assert list(zip(*plan.rows, strict=True)) == [r.actions for r in cache.stats]


def test_a_plan_of_first_block_raises_and_says_why():
    with pytest.raises(ValueError, match="first block"):
        toys.config("first_block").recipe().plan(10)
    with pytest.raises((ValueError, TypeError), match="num_inference_steps"):
        toys.config("mag_cache").recipe().plan(0)


def test_errors_of_a_users_callback_surface_unchanged_and_disable_still_works():
    class Mine(Exception):
        pass

    def broken(*_: Any) -> float:
        raise error

    fields = {
        "pyramid": ["current_timestep_callback"],
        "faster": ["current_timestep_callback", "attention_weight_callback"],
        "faster_guided": [
            "current_timestep_callback",
            "attention_weight_callback",
            "low_frequency_weight_callback",
            "high_frequency_weight_callback",
        ],
    }
    for method, names in fields.items():
        for name in names:
            error = Mine(name)
            target = toys.build(method)
            before = toys.snapshot(target)
            cache, _, clock = enabled(method, target, **{name: broken})
            with pytest.raises(Mine) as caught:
                toys.run(cache, target, toys.inputs_for(method), clock)
            assert caught.value is error
            cache.disable()
            assert toys.snapshot(target) == before


def test_what_a_timestep_callback_may_return():
    for value in (torch.tensor(500), torch.tensor([500.0, 500.0]), 500, None):
        cache, target, _ = enabled("pyramid", current_timestep_callback=lambda v=value: v)
        for call in toys.inputs()[:2]:
            toys.step(target, call)
        assert toys.actions(cache) == ("C." if value is not None else "CC")
    cache, target, _ = enabled("pyramid", current_timestep_callback=lambda: math.nan)
    toys.run(cache, target, toys.inputs()[:3])
    assert toys.actions(cache) == "CCC", "not a number lies in no range"
    for value in ("soon", [], object()):
        cache, target, _clock = enabled("pyramid", current_timestep_callback=lambda v=value: v)
        with pytest.raises(TypeError, match="current_timestep_callback"):
            toys.step(target, toys.inputs()[0])
