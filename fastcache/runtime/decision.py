# SPDX-License-Identifier: Apache-2.0
"""What a step does: asks every rule that can answer before the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import sync
from ..policies import REUSE, Step
from ..recipe import Recipe
from ..storage.state import State
from ..targets.base import BoundTarget
from ..targets.control import PENDING, PENDING_DECISION, WHOLE, StepControl
from .settings import Settings
from .uses import Uses

NONE: dict[str, Any] = {}


class Decider:
    """The rules of one denoiser."""

    def __init__(
        self,
        settings: Settings,
        recipe: Recipe,
        control: StepControl,
        targets: Sequence[BoundTarget],
        uses: Uses,
    ) -> None:
        self.uses = uses
        self.recipe, self.control, self.settings = recipe, control, settings
        self.policies = [rule.when for rule in recipe.rules]
        self.deciders = tuple(target.decider for target in targets)
        # place, whether it decides inside the call, its decider, and what looks at the call's arguments for it
        self.rows = tuple(
            (i, d.inside, d, d.look if d.meter is not None and not d.inside else None)
            for i, d in enumerate(self.deciders)
        )

    def decide(self, state: State, step: Step, args: tuple = (), kwargs: Any = NONE) -> None:
        """Decide for every rule, and write the running step into `control`.

        args, kwargs: of the call; left out where it has not come yet, which rules that look at it do not allow.
        """
        if not state.runs:
            self._begin(state, step)
        control = self.control
        control.state, control.batch, control.phase = state, "full", WHOLE
        decisions, actions, weights = control.decisions, control.actions, control.weights
        for i, inside, decider, look in self.rows:
            if inside:
                decisions[i], actions[i] = PENDING_DECISION, PENDING
                continue
            if look is None:
                decision = decider.decide(state, step)
            else:
                decision = decider.decide(state, step, look(state, step, args, kwargs))
                decider.note_looked_at(state, decision.action)
            decisions[i] = decision
            action = actions[i] = decision.action
            if action != REUSE:
                continue
            if decider.weighted:
                weights[i] = decider.weigh(state.timelines[i].steps, step.index)
                if decider.guide is not None:
                    decider.guide.stage(state, i, weights[i])
            elif decider.halves:
                step = step._replace(guidance_skipped=True)
                control.batch = "half"
        control.step = step

    def upload(self, state: State) -> None:
        """Give compiled code what it has to know of the running step, at the first step of all that are known."""
        if not state.armed_step and state.total and not self.recipe.needs_signal:
            if not all(decider.foreseen(state) for decider in self.deciders):
                rows = self.uses.played(state.total).rows
                for decider, actions in zip(self.deciders, rows, strict=True):
                    if decider.uploads:
                        decider.foresee(state, actions)
        for decider in self.deciders:
            decider.upload(state)

    def _begin(self, state: State, step: Step) -> None:
        """A run begins: every policy remembers nothing."""
        if self.settings.process_group is not None:
            self._agree(state, step, self.settings.process_group)
        state.ends = self.uses.end(state.total)
        state.runs = [policy.begin(state.total) for policy in self.policies]

    def _agree(self, state: State, step: Step, group: Any) -> None:
        """Where ranks share samples: raise on all of them if they are about to run different plans."""
        budget, context = self.settings.budget, state.key[1]
        limit = None if budget is None else budget.limit
        digest = self.recipe.digest(state.total, step.index, context, limit)
        if not sync.unanimous(digest, group, state.device):
            raise RuntimeError(
                "fastcache: config: the ranks of process_group begin different runs, and would part; here it is "
                f"{self.recipe.rules} with num_inference_steps={state.total}, context {context!r}, step "
                f"{step.index}. Give every rank the same config, steps, contexts and max_bytes"
            )
