# SPDX-License-Identifier: Apache-2.0
"""The node, and what it does while a sampler runs. The only file that asks ComfyUI for anything, and only then."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import Any

from ..attached import Attached
from ..engine import engine
from .methods import METHODS, recipe_of

KEY = "fastcache"
LOG = logging.getLogger("fastcache")


class FastcacheNode:
    """Reuses what changes little from step to step, in whatever diffusion transformer it is given."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/fastcache"
    DESCRIPTION = (
        "Skips the transformer's blocks on steps that change little. Threshold 0 and speed 1 skip nothing. What was "
        "reused is shown below the node and in the log when sampling ends."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes, as ComfyUI asks for it."""
        real, share = "FLOAT", {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "method": (list(METHODS), {"default": METHODS[0]}),
                "threshold": (real, {"default": 0.12, "min": 0.0, "max": 2.0, "step": 0.01}),
                "speed": (real, {"default": 1.8, "min": 1.0, "max": 8.0, "step": 0.1}),
                "start_percent": (real, {"default": 0.0, **share}),
                "end_percent": (real, {"default": 1.0, **share}),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    def patch(
        self,
        model: Any,
        method: str,
        threshold: float,
        speed: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        node_id: Any = None,
    ) -> tuple[Any]:
        """A copy of a model that is cached while it is sampled with.

        Args:
            model: ComfyUI's model patcher; it is left as it is.
            method: one of METHODS.
            threshold: of methods that look at a change, unitless; 0 reuses nothing.
            speed: of a schedule: how much fewer steps it computes, unitless, from 1 on.
            start_percent, end_percent: the part of sampling in which steps may be reused, shares from 0 to 1.
            node_id: of the node in the browser; None shows nothing there.
        Returns:
            The copy, alone in a tuple.
        Raises:
            ValueError: that names the field.
            ImportError: this is not running inside ComfyUI, or in one that is too old.
        """
        if not 0 <= start_percent < end_percent <= 1:
            raise ValueError(
                f"start_percent is {start_percent} and end_percent {end_percent}, must be from 0 to 1 and rise"
            )
        recipe_of(
            method, speed, threshold, steps=8
        )  # what is wrong is said here and not when it samples
        kinds = engine("comfy.patcher_extension", "ComfyUI", ("",)).WrappersMP
        patched = model.clone()
        sampling = patched.get_model_object("model_sampling")
        window = tuple(float(sampling.percent_to_sigma(p)) for p in (start_percent, end_percent))
        around = patched.model_options.get("model_function_wrapper")
        session = Sampling(patched, (method, speed, threshold), window, around, node_id)
        patched.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, session.outer_sample)
        patched.set_model_unet_function_wrapper(session.apply)
        return (patched,)


class Sampling:
    """One copy of a model while it is sampled with: attached when sampling begins, restored when it ends.

    Args:
        patcher: the copy.
        setting: method, speed and threshold.
        window: the sigmas between which steps may be reused, the larger one first.
        around: the model function wrapper that another node has set; None without.
        node_id: of the node in the browser, or None.
    """

    def __init__(
        self,
        patcher: Any,
        setting: tuple[str, float, float],
        window: tuple[float, ...],
        around: Any,
        node_id: Any,
    ) -> None:
        self.patcher, self.setting, self.window = patcher, setting, window
        self.around, self.node_id = around, node_id
        self.attached: Attached | None = None
        self.sigma: float | None = None  # of the latest call
        self.calls: Counter[str] = Counter()  # at this sigma, by branch

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's OUTER_SAMPLE wrapper: one generation."""
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        steps = max(len(sigmas) - 1, 1)
        if self.attached is not None:  # a sampler that samples inside its own sampling
            return executor(*args, **kwargs)
        network = self.patcher.get_model_object("diffusion_model")
        method, speed, threshold = self.setting
        attached = Attached(network, recipe_of(method, speed, threshold, steps))
        self.attached, self.sigma = attached, None
        try:
            with attached.run():
                return executor(*args, **kwargs)
        finally:
            self.attached = None
            report(preview(attached), self.node_id)
            attached.close()

    def apply(self, model_function: Any, given: dict[str, Any]) -> Any:
        """The model function wrapper: one call, of the conditional part, the other, or both in one batch."""

        def call() -> Any:
            if self.around is not None:
                return self.around(model_function, given)
            return model_function(given["input"], given["timestep"], **given["c"])

        if self.attached is None:  # called by a node that does not sample
            return call()
        sigma = float(given["timestep"].flatten()[0])
        branch = self.branch(sigma, given)
        begin, end = self.window
        with self.attached.call(branch, compute=not end <= sigma <= begin):
            return call()

    def branch(self, sigma: float, given: dict[str, Any]) -> str:
        """The state that a call uses, by which conditions it holds; areas of one condition are counted."""
        if sigma != self.sigma:
            self.sigma = sigma
            self.calls.clear()
        options = given["c"].get("transformer_options", {})
        parts = options.get("cond_or_uncond") or given.get("cond_or_uncond") or ()
        name = " + ".join("uncond" if part else "cond" for part in parts) or "default"
        self.calls[name] += 1
        count = self.calls[name]
        return name if count == 1 else f"{name}, {count}"


def preview(attached: Attached) -> str:
    """One line per branch: a dot for a reused step."""
    rows: dict[str, str] = {}
    for record in attached.cache.stats:
        mark = "." if record.action == "reuse" else "C"
        rows[record.context] = rows.get(record.context, "") + mark
    count = attached.statistics()
    lines = [f"{count['reused']} of {count['reused'] + count['computed']} calls reused"]
    return "\n".join([*lines, *(f"{name}: {row}" for name, row in rows.items())])


def report(text: str, node_id: Any) -> None:
    """Say it in the log, and below the node where the browser can show that."""
    LOG.info("%s", text)
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    show = getattr(getattr(server, "instance", None), "send_progress_text", None)
    if show is not None and node_id is not None:
        show(text, node_id)
