# SPDX-License-Identifier: Apache-2.0
"""diffusers' own cache calls on fastcache, and the company that an enabled model keeps."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers", minversion="0.36")


import tiny  # noqa: E402

import fastcache  # noqa: E402
from fastcache.integrations import diffusers as backend  # noqa: E402

CONFIGS = {
    "FirstBlockCacheConfig": lambda lib: lib.FirstBlockCacheConfig(0.3),
    "MagCacheConfig": lambda lib: lib.MagCacheConfig(
        num_inference_steps=8, mag_ratios=torch.ones(8)
    ),
    "TaylorSeerCacheConfig": lambda lib: lib.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=[".*attn"]
    ),
    "PyramidAttentionBroadcastConfig": lambda lib: lib.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "FasterCacheConfig": lambda lib: lib.FasterCacheConfig(
        is_guidance_distilled=True, current_timestep_callback=lambda: 500
    ),
}


@pytest.fixture
def installed():
    backend.install()
    yield
    backend.uninstall()


def config(name):
    if not hasattr(diffusers.hooks, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return CONFIGS[name](diffusers.hooks)


def run(model, inputs, name="Flux", steps=8, context="cond"):
    outputs = []
    for call in tiny.trajectory(name, inputs, steps):
        if context is None:
            outputs.append(tiny.output(model, call))
            continue
        with model.cache_context(context):
            outputs.append(tiny.output(model, call))
    return torch.stack(outputs)


def flux():
    return tiny.build("Flux")


# --- install and uninstall -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_enable_cache_runs_on_fastcache_and_disable_cache_undoes_it(installed, name):
    model, inputs = flux()
    uncached = run(model, inputs)
    for _ in range(2):
        model.enable_cache(config(name))
        assert model.is_cache_enabled
        first = run(model, inputs)
        cache = backend.cache_of(model)
        assert cache.stats.reused and not torch.equal(first, uncached)
        model._reset_stateful_cache()
        assert torch.equal(run(model, inputs), first)
        model.disable_cache()
        assert not model.is_cache_enabled and not cache.enabled
        assert "forward" not in model.__dict__
    assert torch.equal(run(model, inputs), uncached)
    with pytest.raises(ValueError, match="no cache is enabled"):
        backend.cache_of(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_outputs_as_enable(installed, name):
    model, inputs = flux()
    with fastcache.enable(model, config(name)):
        expected = run(model, inputs)
    model.enable_cache(config(name))
    assert torch.equal(run(model, inputs), expected)


def test_a_second_enable_is_refused_in_upstreams_words(installed):
    model, _ = flux()
    model.enable_cache(config("FirstBlockCacheConfig"))
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        model.enable_cache(config("FirstBlockCacheConfig"))
    with pytest.raises(ValueError, match="already enabled"):
        diffusers.hooks.apply_first_block_cache(model, config("FirstBlockCacheConfig"))
    with pytest.raises(ValueError, match="already enabled"):
        fastcache.enable(model, config("FirstBlockCacheConfig"))


def test_a_failed_enable_leaves_nothing(installed):
    model, _ = flux()
    with pytest.raises(ValueError, match="nothing_like_it"):
        model.enable_cache(
            diffusers.hooks.TaylorSeerCacheConfig(cache_identifiers=["nothing_like_it"])
        )
    assert not model.is_cache_enabled and "forward" not in model.__dict__
    model.enable_cache(config("FirstBlockCacheConfig"))
    assert backend.cache_of(model).enabled


def test_upstreams_objects_are_not_written_to(installed):
    model, _ = flux()
    theirs = diffusers.hooks.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500)
    with pytest.warns(UserWarning, match="spatial_attention_block_skip_range=2"):
        model.enable_cache(theirs)
    assert theirs.spatial_attention_block_skip_range is None


def test_uninstall_gives_back_upstreams_functions():
    before = {name: getattr(diffusers.hooks, name, None) for name in backend.HOOKS}
    exported = {name: getattr(diffusers, name, None) for name in backend.HOOKS}
    backend.install()
    backend.install()
    assert backend.installed()
    assert all(getattr(diffusers.hooks, n) is not f for n, f in before.items() if f)
    assert all(getattr(diffusers, n) is not f for n, f in exported.items() if f)
    backend.uninstall()
    backend.uninstall()
    assert not backend.installed()
    assert {name: getattr(diffusers.hooks, name, None) for name in backend.HOOKS} == before
    assert {name: getattr(diffusers, name, None) for name in backend.HOOKS} == exported


def test_a_model_enabled_before_uninstall_can_still_be_disabled():
    model, inputs = flux()
    uncached = run(model, inputs)
    backend.install()
    model.enable_cache(config("FirstBlockCacheConfig"))
    backend.uninstall()
    run(model, inputs)
    model.disable_cache()
    assert torch.equal(run(model, inputs), uncached)


def test_a_model_without_cache_mixin_gets_its_context_from_the_registry(installed):
    """SD3 has no cache_context of its own; diffusers' guiders announce contexts through the registry."""
    hooks = pytest.importorskip("diffusers.hooks.hooks")
    model, inputs = tiny.build("SD3")
    diffusers.hooks.apply_first_block_cache(model, diffusers.hooks.FirstBlockCacheConfig(0.5))
    registry = model._diffusers_hook
    for call in tiny.trajectory("SD3", inputs, 6):
        for name in ("cond", "uncond"):
            if hasattr(hooks, "_set_cache_context"):
                hooks._set_cache_context(model, hooks.CacheContext(name))
            else:
                registry._set_context(name)
            tiny.output(model, call)
            if hasattr(hooks, "_set_cache_context"):
                hooks._set_cache_context(model, None)
            else:
                registry._set_context(None)
    cache = backend.cache_of(model)
    assert {r.context for r in cache.stats} == {"cond", "uncond"} and cache.stats.reused
    registry.remove_hook("fbc_leader_block_hook")
    registry.remove_hook("fbc_block_hook")
    assert not cache.enabled and "forward" not in model.__dict__


def test_upstreams_hooks_and_ours_do_not_stack():
    model, _ = flux()
    with fastcache.enable(model, fastcache.FirstBlockCacheConfig()):
        with pytest.raises(ValueError, match="already been enabled"):
            model.enable_cache(config("FirstBlockCacheConfig"))
    model.enable_cache(config("FirstBlockCacheConfig"))
    with pytest.raises(ValueError, match="disable_cache"):
        fastcache.enable(model, fastcache.FirstBlockCacheConfig())
    model.disable_cache()


# --- hooks of others -----------------------------------------------------------------------------


class Counting(diffusers.hooks.ModelHook):
    """A user's hook in diffusers' registry."""

    calls = 0

    def post_forward(self, module, output):
        self.calls += 1
        return output


@pytest.mark.parametrize("cache_first", [True, False])
def test_other_hooks_in_the_registry_survive_the_cache(installed, cache_first):
    model, inputs = flux()
    uncached, hook = run(model, inputs), Counting()
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)
    if cache_first:
        model.enable_cache(config("FirstBlockCacheConfig"))
    registry.register_hook(hook, "counting")
    if not cache_first:
        model.enable_cache(config("FirstBlockCacheConfig"))
    assert not torch.equal(run(model, inputs), uncached) and hook.calls == 8
    model.disable_cache()
    assert torch.equal(run(model, inputs), uncached) and hook.calls == 16
    registry.remove_hook("counting")
    assert torch.equal(run(model, inputs), uncached) and hook.calls == 16


@pytest.mark.parametrize("order", ["hook, cache", "cache, hook"])
@pytest.mark.parametrize("leaves", ["the hook first", "the cache first"])
def test_offload_hooks_of_accelerate_come_and_go(order, leaves):
    """A pipeline with CPU offload takes its hooks off and puts them on again after every run."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = flux()
    uncached = run(model, inputs)

    def hook():
        hooks.add_hook_to_module(model, hooks.ModelHook())

    def enable():
        return fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.3))

    if order == "hook, cache":
        hook()
    cache = enable()
    if order == "cache, hook":
        hook()
    cached = run(model, inputs)
    assert cache.stats.reused
    hooks.remove_hook_from_module(model)
    hook()
    cache.reset()
    assert torch.equal(run(model, inputs), cached), "the cache was lost with the hook"
    if leaves == "the hook first":
        hooks.remove_hook_from_module(model)
        cache.disable()
    else:
        cache.disable()
        assert torch.equal(run(model, inputs), uncached)
        hooks.remove_hook_from_module(model)
    assert torch.equal(run(model, inputs), uncached)
    cache = enable()
    assert torch.equal(run(model, inputs), cached)
    cache.disable()


def test_offloaded_blocks_that_are_skipped_stay_where_they_are():
    """Sequential offload puts a hook on every module; a skipped block moves no weights."""
    hooks = pytest.importorskip("accelerate.hooks")
    moved = []

    class Moving(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(module)
            return args, kwargs

    model, inputs = flux()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        hooks.add_hook_to_module(block, Moving())
    uncached, before = run(model, inputs), len(moved)
    with fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.3)) as cache:
        moved.clear()
        run(model, inputs)
        assert cache.stats.reused and len(moved) < before
    assert torch.equal(run(model, inputs), uncached)


# --- weights that change -------------------------------------------------------------------------


class LowRank(nn.Module):
    """What loading a LoRA does to a linear layer: replaces it by a module that holds it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        for layer in (self.down, self.up):
            layer.weight.data.fill_(0.05)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("to_q", "to_v", "proj_out") and isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child))


def unadapt(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LowRank):
                setattr(module, name, child.base)


@pytest.mark.parametrize("name", [*CONFIGS, "lite"])
def test_adapters_come_and_go_while_enabled(name):
    """After a swap and a reset the outputs are those of a cache enabled on the swapped model."""
    made = (
        fastcache.TaylorSeerCacheConfig(use_lite_mode=True)
        if name == "lite"
        else CONFIGS[name](fastcache)
    )
    model, inputs = flux()
    uncached = run(model, inputs)
    cache = fastcache.enable(model, made)
    plain = run(model, inputs)
    adapt(model)
    cache.reset()
    swapped = run(model, inputs)
    assert not torch.equal(swapped, plain)
    unadapt(model)
    cache.reset()
    assert torch.equal(run(model, inputs), plain)
    adapt(model)
    cache.disable()
    unadapt(model)
    assert torch.equal(run(model, inputs), uncached)
    assert all(not hasattr(m, "_fastcache_node") for m in model.modules())


# --- what else may stand around a block ----------------------------------------------------------


class Wrapped(nn.Module):
    """As FSDP's first version and others wrap a block: another class, whose signature says nothing."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)


def wrap(model):
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = Wrapped(block)


def shard(model):
    """FSDP's second version gives every block a class of its own."""
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks, model):
        torch.distributed.fsdp.fully_shard(block, mesh=mesh)


def offload(model):
    if diffusers.__version__ < "0.42" and not torch.accelerator.is_available():
        pytest.skip(f"diffusers {diffusers.__version__} offloads groups from an accelerator only")
    diffusers.hooks.apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", [wrap, shard, offload])
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_may_be_wrapped_sharded_or_offloaded_in_groups(one_rank, name, change):
    def cached(model):
        with fastcache.enable(model, CONFIGS[name](fastcache)) as cache:
            outputs = run(model, inputs)
        return outputs, [r.actions for r in cache.stats]

    model, inputs = flux()
    expected, actions = cached(model)
    change(model)
    outputs, changed = cached(model)
    assert torch.equal(outputs, expected) and changed == actions


# --- copies, training, sharing -------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("act", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copying_an_enabled_model_is_refused_and_works_again_afterwards(name, act):
    model, inputs = flux()
    uncached = run(model, inputs)
    with fastcache.enable(model, CONFIGS[name](fastcache)) as cache:
        with pytest.raises(TypeError, match=r"cache\.disable\(\)"):
            act(model)
        run(model, inputs)
        assert cache.stats.reused
        assert set(model.state_dict()) == set(flux()[0].state_dict())
    assert torch.equal(run(copy.deepcopy(model), inputs), uncached)


def test_training_with_gradient_checkpointing_is_refused_and_sampling_is_not():
    model, inputs = flux()
    model.enable_gradient_checkpointing()
    model.train().requires_grad_(True)
    call = tiny.trajectory("Flux", inputs, 2)[0]
    with fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.3)) as cache:
        with pytest.raises(ValueError, match="training"):
            model(**call)
        model.eval()
        run(model, inputs)
        assert cache.stats.reused
        model.train()
        with torch.no_grad():
            run(model, inputs)
    model(**call, return_dict=False)[0].sum().backward()


def test_pipelines_that_share_a_transformer_share_its_cache():
    model, _ = flux()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    one = diffusers.FluxPipeline(scheduler=scheduler, transformer=model, **parts)
    other = diffusers.FluxPipeline.from_pipe(one)
    with fastcache.enable(one, fastcache.FirstBlockCacheConfig(0.3)):
        with pytest.raises(ValueError, match="already enabled"):
            fastcache.enable(other, fastcache.FirstBlockCacheConfig(0.3))
    fastcache.enable(other, fastcache.FirstBlockCacheConfig(0.3)).disable()


def test_two_denoisers_are_enabled_both_or_not_at_all():
    class Pipe:
        pass

    pipe = Pipe()
    pipe.transformer, pipe.transformer_2 = flux()[0], nn.Linear(2, 2)
    with pytest.raises(ValueError, match="nothing to hook"):
        fastcache.enable(pipe, fastcache.FirstBlockCacheConfig())
    assert "forward" not in pipe.transformer.__dict__
    pipe.transformer_2 = tiny.build("Wan3D")[0]
    with fastcache.enable(pipe, fastcache.FirstBlockCacheConfig()) as cache:
        assert [d.name for d in cache.denoisers] == ["transformer", "transformer_2"]


# --- what a model's own loop does between blocks -------------------------------------------------


def controlled(call, inputs):
    """Residuals of a ControlNet, one per block."""
    g = torch.Generator().manual_seed(5)
    width = 32 if inputs is None else inputs
    for key, count in (("controlnet_block_samples", 3), ("controlnet_single_block_samples", 3)):
        tokens = call["hidden_states"].shape[1]
        call[key] = [0.3 * torch.randn(1, tokens, width, generator=g) for _ in range(count)]
    return call


@pytest.mark.parametrize("name", ["FirstBlockCacheConfig", "MagCacheConfig"])
@pytest.mark.parametrize("start", [0, 2])
def test_control_residuals_between_blocks_are_neither_lost_nor_counted_twice(name, start):
    """The model adds them inside its loop; a skipped stack used to add the first one once more."""
    model, inputs = flux()
    width = model.inner_dim
    still = [copy.deepcopy(inputs) for _ in range(6)]
    for call in still[start:]:
        controlled(call, width)
    expected = [tiny.output(model, call) for call in still]
    with fastcache.enable(model, CONFIGS[name](fastcache)) as cache:
        for i, call in enumerate(still):
            with cache.context("cond", step_index=i, num_inference_steps=6):
                output = tiny.output(model, call)
            assert torch.allclose(output, expected[i], atol=1e-4 * expected[i].abs().max())
        assert sum(r.action == "reuse" for r in cache.stats) >= 2


class Collecting(nn.Module):
    """Returns what each of its blocks makes, as a ControlNet does; or leaves it in cycles of garbage."""

    def __init__(self, cycles=False):
        super().__init__()
        self.cycles = cycles
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, hidden_states):
        samples = []
        for block in self.blocks:
            hidden_states = block(hidden_states)
            samples.append(hidden_states)
            if self.cycles:
                samples.append(samples)
                samples = []
        return hidden_states if self.cycles else samples


@pytest.mark.parametrize("name", ["FirstBlockCacheConfig", "MagCacheConfig"])
def test_a_model_that_collects_what_its_blocks_return_is_refused(name):
    """A skipped stack used to give a ControlNet one residual where there should be one per block."""
    with torch.no_grad(), fastcache.enable(Collecting(), CONFIGS[name](fastcache)) as cache:
        with pytest.raises(ValueError, match="keeps what each block"):
            cache.denoisers[0].model(torch.ones(1, 3, 4))
        assert not len(cache.stats)
    with (
        torch.no_grad(),
        fastcache.enable(Collecting(cycles=True), CONFIGS[name](fastcache)) as cache,
    ):
        for _ in range(3):
            cache.denoisers[0].model(torch.ones(1, 3, 4))
        assert cache.stats.reused


@pytest.mark.parametrize("model", ["Flux", "Chroma", "HunyuanVideo", "Latte", "Wan3D", "LTX"])
def test_lists_of_a_single_block_are_not_taken_for_collected(model):
    """What the runtime itself still held of a list of one block used to look like that."""
    made, inputs = tiny.build(model, depth=1)
    names = ["MagCacheConfig"]
    if sum(isinstance(m, nn.ModuleList) and bool(len(m)) for m in made.children()) > 1:
        names.append("FirstBlockCacheConfig")
    for name in names:
        with fastcache.enable(made, CONFIGS[name](fastcache)) as cache:
            run(made, inputs, model)
            assert cache.stats.reused


@pytest.mark.parametrize("name", ["FirstBlockCacheConfig", "MagCacheConfig"])
def test_a_users_hook_may_collect_what_blocks_return(name):
    model, inputs = flux()
    collected = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: collected.append(output))
    with fastcache.enable(model, CONFIGS[name](fastcache)) as cache:
        run(model, inputs)
        assert cache.stats.reused and collected


class Extracting(nn.Module):
    """Keeps keys of a reference in a call of its own, as Wan-Animate 2 and QwenImage 2.1 do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden_states, timestep, kv_cache, kv_cache_mode):
        if kv_cache_mode == "cached":  # QwenImage's blocks see fewer tokens from here on
            hidden_states = hidden_states[:, 1:]
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
            if kv_cache_mode == "extract":
                kv_cache.append(hidden_states)
        return hidden_states


class TakingMore(Extracting):
    """The same behind a forward that does not name all that it takes."""

    def forward(self, hidden_states, timestep, kv_cache, **rest):
        return super().forward(hidden_states, timestep, kv_cache, **rest)


@pytest.mark.parametrize("kind", [Extracting, TakingMore])
@pytest.mark.parametrize("name", ["FirstBlockCacheConfig", "MagCacheConfig"])
def test_calls_that_fill_a_cache_of_the_models_own_are_never_skipped(name, kind):
    """They were counted as steps: one was skipped, and a step after one met storage of another shape."""
    model, kept = kind().eval(), []
    with torch.no_grad(), fastcache.enable(model, CONFIGS[name](fastcache)) as cache:
        for segment in range(2):
            model(torch.ones(1, 5, 4), torch.tensor(900.0), kept, kv_cache_mode="extract")
            assert len(kept) == 3 * (segment + 1)
            for i in range(5):
                model(torch.ones(1, 5, 4), torch.tensor(900.0 - i), None, kv_cache_mode="cached")
    assert [r.step for r in cache.stats] == 2 * [0, 1, 2, 3, 4]
    assert cache.stats.reused


def test_a_run_without_a_single_context_warns_of_nothing():
    model, inputs = flux()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.3)) as cache:
            run(model, inputs, context=None)
            assert {r.context for r in cache.stats} == {"default"}


@pytest.mark.parametrize("branches", [("cond", "uncond"), ("pred_cond", "pred_uncond")])
def test_a_batch_of_two_prompts_is_not_taken_for_two_halves(branches):
    """Guiders of modular pipelines run one call per branch too, under names of their own."""
    model, inputs = tiny.build("CogVideoX")
    calls = [{k: torch.cat([v, v]) for k, v in inputs.items()} for _ in branches]
    config = fastcache.FasterCacheConfig(
        tensor_format="BFCHW", current_timestep_callback=lambda: 500
    )
    with fastcache.enable(model, config):
        with model.cache_context(branches[0]):
            tiny.output(model, calls[0])
        with pytest.raises(ValueError, match="one call per branch"):
            with model.cache_context(branches[1]):
                tiny.output(model, calls[1])


def test_copied_latents_that_cannot_be_compared_are_told_apart_by_their_timestep():
    """On an accelerator no values are read; tensors without values stand for that here."""
    from fastcache.runtime.branches import BranchDetector

    def fresh():
        return torch.zeros(2, device="meta")

    branches = BranchDetector()
    for step in range(3):
        timestep = torch.tensor([500.0 - step])
        assert [branches.of(fresh(), timestep, [fresh()]) for _ in range(2)] == [0, 1]
    kept = [fresh(), fresh()]
    for step in range(3):
        timestep = torch.tensor([400.0 - step])
        assert [branches.of(fresh(), timestep, [k]) for k in kept] == [0, 1]
    condition = fresh()
    branches.clear()
    assert {branches.of(fresh(), torch.tensor([1.0]), [condition]) for _ in range(3)} == {0}
