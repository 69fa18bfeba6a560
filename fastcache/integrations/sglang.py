# SPDX-License-Identifier: Apache-2.0
"""SGLang's diffusion runtime on fastcache.

    SGLANG_EXTERNAL_MODEL_PACKAGE=fastcache.integrations.sglang sglang serve ...

SGLang imports that package once in each of its processes. From then on what it does with cache-dit runs here:
requests with `enable_cache_dit`, with their `cache_dit_params`, and SGLANG_CACHE_DIT_ENABLED for all of them. Imported
where there is no SGLang, this module changes nothing; `register()` then says so.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import nn

from ..configs import DBCacheConfig
from .attached import Attached
from .engine import Swaps, engine
from .from_fields import config_of

HOME = "sglang.multimodal_gen.runtime.cache.cache_dit_integration"
VERSIONS = ("0.5.",)
ATTACHED = "_fastcache_sglang"  # what a transformer keeps: its cache, and what it was made of
SWAPPED = Swaps()


def register() -> None:
    """Let SGLang's calls of cache-dit run on fastcache, in this process. Calling it again does nothing.

    Raises:
        ImportError: SGLang is not installed, or of a version that is not known.
    Source: SGLang 0.5.23.
    """
    if SWAPPED:
        return
    home = engine(HOME, "sglang", VERSIONS)
    for name, ours in OURS.items():
        original = getattr(home, name)
        for path, module in list(sys.modules.items()):
            if path.split(".")[0] == "sglang" and vars(module).get(name) is original:
                SWAPPED.put(module, name, ours)


def unregister() -> None:
    """Give SGLang its own functions back. Transformers that are enabled stay so until they are disabled."""
    SWAPPED.undo()


def enable_cache_on_transformer(
    transformer: nn.Module,
    config: Any,
    model_name: str = "transformer",
    sp_group: Any = None,
    tp_group: Any = None,
    has_separate_cfg: bool = False,
    joint_cfg_decision: bool = False,
) -> nn.Module:
    """A cache on a transformer, compiled already or not; branches of guidance are told apart by themselves.

    Args:
        transformer: the module.
        config: SGLang's CacheDitConfig.
        model_name, has_separate_cfg, joint_cfg_decision: taken and not needed.
        sp_group, tp_group: of ranks that share a sample; they decide alike.
    Returns:
        The transformer.
    Raises:
        TypeError, ValueError: that names what is wrong; the transformer is left as it was.
    """
    if not config.enabled:
        return transformer
    attach([transformer], config, sp_group or tp_group)
    return transformer


def enable_cache_on_dual_transformer(
    transformer: nn.Module,
    transformer_2: nn.Module,
    primary_config: Any,
    secondary_config: Any,
    model_name: str = "wan2.2",
    sp_group: Any = None,
    tp_group: Any = None,
    has_separate_cfg: bool = True,
) -> tuple[nn.Module, nn.Module]:
    """The same for two transformers, each by a config of its own."""
    group = sp_group or tp_group
    for module, config in ((transformer, primary_config), (transformer_2, secondary_config)):
        if config.enabled:
            attach([module], config, group)
    return transformer, transformer_2


def refresh_context_on_transformer(
    transformer: nn.Module,
    num_inference_steps: int,
    scm_preset: str | None = None,
    verbose: bool = False,
    steps_computation_mask: list[int] | None = None,
    steps_computation_policy: str | None = None,
) -> None:
    """A request begins: what ran is forgotten.

    Args:
        transformer: one that is enabled.
        num_inference_steps: of the request, a count.
        scm_preset: a mask by name.
        verbose: taken and not needed.
        steps_computation_mask: a mask step by step; steps_computation_policy: "dynamic" or "static".
    """
    attached, fields = kept(transformer)
    fields = {
        **fields,
        "num_inference_steps": num_inference_steps,
        "steps_computation_mask": steps_computation_mask,
        "steps_computation_policy": steps_computation_policy or scm_preset,
        "scm_steps_mask_policy": None if steps_computation_mask else scm_preset,
    }
    if fields["steps_computation_policy"] not in ("dynamic", "static"):
        fields["steps_computation_policy"] = None
    attached.refresh(num_inference_steps, config_of(fields, num_inference_steps))
    vars(transformer)[ATTACHED] = attached, fields


def refresh_context_on_dual_transformer(
    transformer: nn.Module,
    transformer_2: nn.Module,
    num_high_noise_steps: int,
    num_low_noise_steps: int,
    scm_preset: str | None = None,
    verbose: bool = False,
    steps_computation_mask: list[int] | None = None,
    steps_computation_mask_2: list[int] | None = None,
    steps_computation_policy: str | None = None,
) -> None:
    """The same for two transformers."""
    for module, steps, mask in (
        (transformer, num_high_noise_steps, steps_computation_mask),
        (transformer_2, num_low_noise_steps, steps_computation_mask_2),
    ):
        refresh_context_on_transformer(
            module, steps, scm_preset, verbose, mask, steps_computation_policy
        )


def disable_cache_on_transformer(transformer: nn.Module) -> nn.Module:
    """The transformer is as it was before. One without a cache stays as it is."""
    held = vars(transformer).pop(ATTACHED, None)
    if held is not None:
        held[0].close()
    return transformer


OURS = {
    function.__name__: function
    for function in (
        enable_cache_on_transformer,
        enable_cache_on_dual_transformer,
        refresh_context_on_transformer,
        refresh_context_on_dual_transformer,
        disable_cache_on_transformer,
    )
}


def attach(modules: list[nn.Module], config: Any, group: Any) -> None:
    """A cache on modules by SGLang's config; calls of a module are counted, since SGLang says when they begin."""
    fields = {k: v for k, v in vars(config).items() if k in KNOWN}
    attached = Attached(
        modules, config_of(fields, fields.get("num_inference_steps")), process_group=group
    )
    for module in modules:
        vars(module)[ATTACHED] = attached, fields


KNOWN = frozenset(f.name for f in dataclasses.fields(DBCacheConfig)) | frozenset(
    ("enable_taylorseer", "taylorseer_order", "enable_dmd", "dmd_history", "dmd_ridge")
)


def kept(transformer: nn.Module) -> tuple[Attached, dict[str, Any]]:
    """The cache on a transformer, and the fields that it was made of."""
    held = vars(transformer).get(ATTACHED)
    if held is None:
        raise ValueError(
            f"transformer: no cache is enabled on this {type(transformer).__name__}; enable one before it is refreshed"
        )
    attached, fields = held
    return attached, fields


if "sglang" in sys.modules:  # which is importing this
    register()
