# SPDX-License-Identifier: Apache-2.0
"""The stages of a run on a GPU: what each is called, and how many seconds it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage is `bench.gpu.<module>.run`, in a process of its own that is killed at its limit."""

    name: str
    limit: float  # seconds
    brings: str
    module: str = ""  # the name, unless told otherwise


# in order of what a run that is cut short must have brought
FIRST = (
    Stage("ceilings", 15, "the machine; a large copy and a matrix product"),
    Stage("correctness", 45, "every kernel at model size, layouts, models, the tests"),
    Stage("kernels", 60, "each op by graph replay; what a call takes on the host"),
    Stage("programs", 60, "device reads per step; tests of captured programs"),
    Stage("runs", 130, "whole runs of FLUX.1, eager, beside the peers"),
    Stage("apart", 25, "one reused step: kernels, gaps, host"),
    Stage("regional", 60, "whole runs with compiled blocks"),
    Stage("captured", 60, "whole runs with captured reused steps"),
    Stage("whole", 90, "a whole run of one captured graph per mode; memory checks"),
)
SECOND = (
    Stage("train", 190, "the picture model, trained", "picture"),
    Stage("evaluate", 240, "quality on the picture model", "picture"),
)
CALLS = {"first": FIRST, "second": SECOND}
MOST = 560.0  # seconds that the limits of one call may add up to


def chosen(words: list[str]) -> list[Stage]:
    """The stages that are meant: names of calls or of stages; none means the first call."""
    known = {stage.name: [stage] for call in CALLS.values() for stage in call}
    known |= {name: list(call) for name, call in CALLS.items()}
    for word in words:
        if word not in known:
            raise ValueError(f"stage is {word!r}, must be one of {list(known)}")
    return [stage for word in words or ["first"] for stage in known[word]]
