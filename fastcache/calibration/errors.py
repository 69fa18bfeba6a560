# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a calibration."""

from __future__ import annotations


class CalibrationError(ValueError):
    """A calibration cannot be measured, loaded or used; the message says why."""


class CalibrationNotFound(CalibrationError, FileNotFoundError):
    """There is no such calibration file."""

    def __str__(self) -> str:
        return str(self.args[0])
