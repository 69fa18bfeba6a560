"""A mask that was planned for one model, its scheduler and the length of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import COMPUTE, Decision, Policy, Run, Step
from .schedule import Mask


@dataclass(frozen=True)
class Planned(Mask):
    """Compute exactly the steps marked True (or 1), in runs of the model that they were planned for.

    A run of another length computes every step, and its end says why.

    Args:
        compute: one entry per step of the run, True (1) for a computed and False (0) for a reused one.
        scaled: False.
        model: name of the class of the model, or of one that it derives from; "" for any.
        scheduler: name of the class of the pipeline's scheduler; "" for any. Not asked where there is no pipeline.
        warmup, max_skips, last: guards of every `Policy`, none unless given.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or the recipe is enabled on another model or scheduler; the message
            names it.
    Source: plans as of DPCache (CVPR 2026) and LeMiCa (arXiv 2511.00090).
    """

    model: str = ""
    scheduler: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "scheduler"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"Planned: {name} is {getattr(self, name)!r}, must be the name of a class"
                )
        super().__post_init__()
        if self.scaled:
            raise ValueError(
                "Planned: scaled is True, must be False: the steps are those of one length of run"
            )

    @property
    def num_inference_steps(self) -> int:
        """The length of run that it is for."""
        return len(tuple(self.compute))

    def on_model(self, classes: Sequence[str], scheduler: str = "") -> Policy:
        for name, wanted, found in (
            ("model", self.model, tuple(classes)),
            ("scheduler", self.scheduler, (scheduler,) if scheduler else ()),
        ):
            if wanted and found and wanted not in found:
                raise ValueError(
                    f"Planned: {name} is {wanted!r}, which the steps were planned for, and this is a {found[0]}; plan "
                    "anew with `fastcache calibrate --plan`, or say Mask(...) to have them all the same"
                )
        return self

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        planned, total = len(run.memory), step.total
        if not guard and total is not None and total != planned:
            return Decision(
                COMPUTE, reason=f"planned for {planned} steps, and this run has {total}"
            )
        return super()._judge(run, step, signal, guard)
