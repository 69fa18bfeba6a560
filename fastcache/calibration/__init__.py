# SPDX-License-Identifier: Apache-2.0
"""What a calibrating run has measured, as an object and as a file."""
