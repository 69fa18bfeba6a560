# SPDX-License-Identifier: Apache-2.0
"""What a target is: a part of one model that a rule skips, as the runtime and compiled steps see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import nn

from ..models.adapter import BlockAdapter
from ..policies import COMPUTE
from ..storage.group import SlotGroup
from ..storage.state import State
from ..storage.together import Group, Member
from .decide import Part, RuleDecider
from .guide import Guide


class NothingToHook(ValueError):
    """A target means no module of this model. spared: a recipe does without it where another rule fits."""

    spared = False


class Binding(NamedTuple):
    """What a target is made with.

    part: its rule. model: whose part it is. adapter: how blocks are found and driven. make_store: (value,
    timeline) -> a stream that keeps such values as the rule's predictor wants them. taken: ids of modules that
    earlier rules have claimed; whoever claims some adds them. halved: an earlier rule skips half of a guidance
    batch.
    """

    part: Part
    model: nn.Module
    adapter: BlockAdapter
    make_store: Callable[[Any, Any], Any]
    taken: set[int]
    halved: bool


class BoundTarget:
    """A part of one model, bound to one rule of a recipe.

    A subclass says how the part is hooked, and when there is something valid to reuse; the other methods do
    nothing unless it writes them. In a call they come in this order: `ready` while the step is decided, `begin`,
    then the model's forward inside `around`, `finish` after a call that had no storage yet, `commit` once the
    step has gone well. Whatever raises leaves the run forgotten.

    Class attributes: `wraps` says that `around` stands around the model's forward; `one_batch` that guidance has
    to come in one call, so `refuse` and `refuse_branch` are asked; `counted` that a reused step has to be seen to
    predict `segments` values, else `unanswered` is asked; `own_slots` makes what the target keeps for
    a run beside the histories, found in `state.slots[rule].own`.

    Args:
        part: the rule, and what the targets of a model share.
        guide: where the weights of a prediction come from this step's own blocks.
        weighted: one set of weights serves the whole target.
        halves: a reused step sees half of a guidance batch.
    """

    wraps: ClassVar[bool] = False
    one_batch: ClassVar[bool] = False
    counted: ClassVar[bool] = False
    own_slots: ClassVar[type[SlotGroup] | None] = None
    segments: int = 0

    def __init__(
        self, part: Part, guide: Guide | None = None, weighted: bool = True, halves: bool = False
    ) -> None:
        self.rule, self.control = part.index, part.control
        self.decider = RuleDecider(part, self.ready, guide, weighted, halves, self.own_slots)

    # --- on the model -----------------------------------------------------------------------------------

    def install(self) -> None:
        """Hook the model; what was done is undone by `remove`, also after a failure half way."""

    def remove(self) -> None:
        """Leave the model as it was found. May be called without `install`."""

    def hooked(self) -> list[str]:
        """What is hooked.

        Returns:
            Names, for people.
        """
        return []

    @property
    def block_lists(self) -> list[str]:
        """Names of the lists whose blocks are skipped together."""
        return []

    def refuse(self, names: set[str]) -> None:
        """Raise where a request cannot be cached, by what its contexts are called.

        Args:
            names: of the contexts of one request so far.
        Raises:
            ValueError: the message says what to do.
        """

    def refuse_branch(self) -> None:
        """Called where the same latents come twice at one timestep: raise if that cannot be cached.

        Raises:
            ValueError: the message says what to do.
        """

    # --- one call ---------------------------------------------------------------------------------------

    def ready(self, state: State) -> bool:
        """Whether a step can be reused: here, where all units have followed their timeline.

        Args:
            state: of the running request and context.
        Returns:
            Whether there is something valid.
        """
        if self.control.batch == "full" and state.steps_until_full_batch:
            return False  # steps of the conditional half alone have left the other half behind
        units, timeline = state.units[self.rule], state.timelines[self.rule]
        usable = [unit.ready(timeline) for unit in units.values()]  # all of them are asked
        return bool(usable) and all(usable)

    def begin(self) -> bool:
        """Get ready for the model's forward, the step being decided; `control` holds it.

        Returns:
            As `recorded`, for the state of the step.
        """
        return self.recorded(self.control.state)

    def recorded(self, state: State) -> bool:
        """Whether all storage exists, so that compiled code may run: here, once there is a unit.

        Args:
            state: of the running request and context.
        Returns:
            False where the call has to be a recording one.
        """
        return bool(state.units[self.rule])

    def around(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The model's output, where `wraps`. torch.compile(model) traces it, and finds weights on the device.

        Args:
            run: the model's forward; it may be left out.
            args, kwargs: of the call.
        Returns:
            What the model returns, or what stands in for it.
        """
        return run(*args, **kwargs)

    def finish(self) -> None:
        """Take over what a call that allocated storage has shown."""

    def unalias_outputs(self, output: Any) -> Any:
        """What the model returns after such a call, without storage in it, since callers may keep it.

        Args:
            output: as the model has returned it.
        Returns:
            The same, tensors that lie in storage copied.
        """
        return output

    def unanswered(self) -> bool:
        """Whether a step that was to be reused has predicted too little, so that it is computed instead.

        Returns:
            False unless the model has not called what stood in.
        """
        return False

    def commit(self, state: State, action: str) -> None:
        """Note that a step went well: a computed one, and where it `halves` a batch a reused one too.

        Here, how many computed steps the unconditional half of the histories lags behind.

        Args:
            state: of the running request and context.
            action: "compute" or "reuse".
        """
        if action == COMPUTE:
            left = max(state.steps_until_full_batch - 1, 0)
            half = self.control.batch == "half"
            state.steps_until_full_batch = state.timelines[self.rule].depth if half else left

    def prepare_like(self, state: State, other: State) -> None:
        """Give a state that has had no call yet the storage that its calls will need: here, nothing.

        Args:
            state: of a request that begins.
            other: of one whose calls have the same signature, and which has had some.
        """

    def together(self, samples: Sequence[Member], head: Group | None = None) -> Group | None:
        """Several states, each of one sample, as one that a call of all of them reads and writes.

        Args:
            samples: of requests whose step does the same, or is to be decided inside the call.
            head: of a call that has run the first blocks for these samples and others, which go on otherwise.
        Returns:
            What stands for the states; None where samples cannot be told apart: here, always.
        """
        return None

    @contextlib.contextmanager
    def serving(self, group: Group) -> Iterator[bool]:
        """Be in charge of the model's forward for a group.

        Args:
            group: made by `together`.
        Returns:
            A context, with whether all storage exists.
        """
        self.control.state = group
        yield self.control.begin_step([self])

    # --- compiled steps ---------------------------------------------------------------------------------

    @property
    def layout_key(self) -> tuple:
        """What a call that allocated storage may have changed of how the model is driven, hashable."""
        return ()

    def graph_begins(self) -> None:
        """Some of the model is about to be traced, in the middle of a call."""

    # --- what it takes ----------------------------------------------------------------------------------

    def bytes_for(self, shapes: Any) -> int:
        """Bytes that it will hold for a context, as far as sizes of hidden states tell; 0 where not known.

        Args:
            shapes: sizes of hidden states, a `fastcache.tools.memory.Shapes`.
        Returns:
            A count of bytes.
        """
        return 0
