# SPDX-License-Identifier: Apache-2.0
"""What a recipe was found on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .files import FileError, is_text

MADE_FOR = "made_for"  # of a recipe file


@dataclass(frozen=True)
class MadeFor:
    """What a recipe was found on, so that its use on something else is said.

    Args:
        model: class of the denoiser, "" where not known.
        scheduler: class of the pipeline's scheduler, "" where there was none.
        steps: of the run, as the denoiser counts them; 0 where not known.
    """

    model: str = ""
    scheduler: str = ""
    steps: int = 0

    def differs(self, **given: str | int) -> list[str]:
        """What is another than it was made for, in words.

        Args:
            given: values by the names of the fields; "" and 0 are not known, and differ from nothing.
        Returns:
            A phrase per difference.
        """
        own = asdict(self)
        return [
            f"{name} {own[name]}, not for {value}"
            for name, value in given.items()
            if value and own[name] and value != own[name]
        ]

    @classmethod
    def read(cls, held: Any) -> MadeFor | None:
        """What a file says; None where it says nothing.

        Args:
            held: the object under `made_for`, or None.
        Returns:
            The facts.
        Raises:
            ValueError: a field is missing or of another type.
        """
        if held is None:
            return None
        names = ("model", "scheduler", "steps")
        if not isinstance(held, dict) or set(held) != set(names):
            raise FileError(f"recipe: {MADE_FOR} must hold {', '.join(names)}")
        for name in names[:2]:
            if not is_text(held[name]):
                raise FileError(f"recipe: {MADE_FOR}.{name} must be a short string")
        if type(held["steps"]) is not int or held["steps"] < 0:
            raise FileError(f"recipe: {MADE_FOR}.steps must be a whole number")
        return cls(**held)


def class_of_scheduler(target: Any) -> str:
    """Class of a pipeline's scheduler, by name; "" where there is none."""
    scheduler = getattr(target, "scheduler", None)
    return "" if scheduler is None else type(scheduler).__name__
