# SPDX-License-Identifier: Apache-2.0
"""What a block list hands out while a cache is attached: the blocks themselves, or what stands in for them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch

from ...policies import COMPUTE, REUSE
from ...storage.allocate import Unfit
from ..control import HEAD, PENDING, REST, WHOLE
from ..install import hooked_class, put_back
from .layout import BlockList, Layout, Stack
from .play import Player
from .probe import decide_by_input
from .recording import Recorder
from .roles import BLOCK, ROLES, BlockStandIn, roles_of
from .routing import HOOK, RoutedModuleList


class BlockListHook(Player):
    """One block list while a cache is attached: what it hands out, by the roles that its blocks play."""

    made: dict[
        str, list
    ]  # what is handed out on reused steps, and before a decision that ends a program, by the phase
    ready_made: bool  # also for traced code, which is given the blocks themselves
    waiting: list | None  # until a step is decided
    behind: list | None  # and after that, where it is reused

    def __init__(self, stack: Stack, blocks: BlockList) -> None:
        super().__init__(stack, blocks)
        self.recorder: Recorder | None = None  # of the running call
        self.furnish(blocks)

    def install(self) -> None:
        """Stand in the list: what the model iterates over is handed out here."""
        modules = self.blocks.modules
        modules.__dict__[HOOK] = self
        modules.__class__ = hooked_class(type(modules), RoutedModuleList)

    def remove(self) -> None:
        self.blocks.modules.__dict__.pop(HOOK, None)
        put_back(self.blocks.modules, RoutedModuleList)

    def furnish(self, blocks: BlockList) -> None:
        """Make what stands in for these blocks: beforehand, since traced code cannot."""
        self.take_blocks(blocks)
        self._forget_handed_out()
        stack = self.stack
        # what enters its first block is looked at where that always runs, and by whom
        self.opening = not blocks.index and (
            stack.probed or stack.guide is not None or stack.meter is not None
        )
        # how many blocks are called until the step is decided, where it is in this list
        self.decided_by = self.head if self.probed else 1
        makes = [(role, getattr(self, role)) for role in ROLES]
        self.stand_ins = {role: [BlockStandIn(f, b) for b in blocks.known] for role, f in makes}
        known = enumerate(blocks.known)
        self.between = [BlockStandIn(partial(self.run_as_it_is, i), b) for i, b in known]

    def watch(self, recorder: Recorder | None) -> None:
        """Hand out what the recorder of this call stands in with; None: no call is recorded."""
        self.recorder = recorder

    def arrange(self, layout: Layout, hooks: list[BlockListHook]) -> None:
        """Go by this layout from now on. hooks: of all lists."""
        place = layout.places[self.blocks.index]
        self.take_layout(layout, place)
        self.opener = hooks[place.opener]
        self._forget_handed_out()
        known = [(WHOLE, self._roles(REUSE, WHOLE)), (REST, self._roles(REUSE, REST))]
        if self.probed or self.asks:  # a head ends in it
            known.append((HEAD, self._roles(PENDING, HEAD)[: self.decided_by]))
        for phase, roles in known:
            self.made[phase] = self._items(roles)
            if self.tail or BLOCK in roles:
                self.ready_made = False
        self.behind = self.made[WHOLE][self.decided_by :]

    def _forget_handed_out(self) -> None:
        self.made, self.ready_made = {}, True
        self.waiting = self.behind = None

    # --- what the list hands out ------------------------------------------------------------------------

    def route(self) -> Iterator:
        """What the model's loop gets."""
        control = self.control
        action, phase = control.actions[self.stack.rule], control.phase
        if self.recorder is not None:
            return self.recorder.walk(self.blocks.index)
        if action == REUSE or phase == HEAD:
            if phase in self.made and (self.ready_made or not control.may_be_compiled):
                return iter(self.made[phase])
        elif self.skips and action != COMPUTE and phase == WHOLE:
            waiting = self.waiting
            return self._route_undecided() if waiting is None else chain(waiting, self)
        return iter(self._items(self._roles()))

    def pick(self, index: Any) -> Any:
        """`blocks[i]` or `blocks[a:b]` inside a model's forward, routed like iteration."""
        if self.recorder is not None:
            return self.recorder.items(self.blocks.index)[index]
        if self._undecided():
            return list(self._route_undecided())[index]
        return self._items(self._roles_of_all())[index]

    def _undecided(self) -> bool:
        """Whether it is still open, in this pass, what becomes of blocks of this list."""
        control = self.control
        undecided = control.actions[self.stack.rule] not in (COMPUTE, REUSE)
        return undecided and control.phase == WHOLE and self.skips

    def _roles(self, action: str = "", phase: str = "") -> list[str]:
        """The roles of a step, its action being known; by default of the one that runs."""
        return roles_of(
            action or self.control.actions[self.stack.rule],
            phase or self.control.phase,
            self.blocks.untailed,
            opens=self.opens,
            closes=self.closes,
            head=self.head,
            probed=self.probed,
            loop_does_more=self.loop_does_more,
            asks=self.asks,
            tailed=bool(self.tail),
            watched=self.stack.probed,
            opening=self.opening,
        )

    def _roles_of_all(self) -> list[str]:
        """The same, where a model asks for each of its blocks, also for those that others stand in for."""
        roles = self._roles()
        return roles + ["pass_through"] * (len(self.blocks.untailed) - len(roles))

    def _items(self, roles: list[str]) -> list:
        """The stand-ins that play these roles, or the blocks themselves, each in its place; then the tail."""
        blocks: list = []
        if BLOCK in roles or self.tail:  # traced code guards what it reads
            blocks = self.blocks.blocks() if torch.compiler.is_compiling() else self.between
        given = self.stand_ins
        try:
            items = [blocks[i] if r == BLOCK else given[r][i] for i, r in enumerate(roles)]
        except IndexError:
            raise Unfit("blocks were added") from None
        return items + blocks[-self.tail :] if self.tail else items

    def _route_undecided(self) -> Iterator:
        """Where the decision falls in this list: before its first block, or after the head (eager only)."""
        if not (self.probed or self.asks):  # taking turns with the first list: not yet decided
            return self._late(0)
        if self.waiting is None:
            self.waiting = self._items(self._roles())[: self.decided_by]
        return chain(self.waiting, self)

    def __iter__(self) -> Iterator:
        """What comes behind the blocks that decide, to a loop that has got so far."""
        action = self.control.actions[self.stack.rule]
        if action == REUSE and self.behind is not None:
            return iter(self.behind)
        if action in (COMPUTE, REUSE):
            return iter(self._items(self._roles())[self.decided_by :])
        return self._late(self.decided_by)  # all blocks are asked for before the first one runs

    def _late(self, start: int) -> Iterator:
        """Stand-ins that take their role when they are called, from this place on."""
        for i, block in enumerate(self.blocks.blocks()[start:], start):
            yield BlockStandIn(partial(self._run_late, i), block)

    def _run_late(self, index: int, args: tuple, kwargs: dict) -> Any:
        return self._items(self._roles_of_all())[index](*args, **kwargs)

    # --- deciding ---

    def decide_first(self, args: tuple, kwargs: dict) -> Any:
        """The first block of the stack, where what enters it decides whether it runs."""
        decide_by_input(self.stack, self.blocks, args, kwargs)
        if self.control.actions[self.stack.rule] != REUSE and not torch.compiler.is_compiling():
            self.stack.start_way()
        return getattr(self, self._roles_of_all()[0])(args, kwargs)
