# SPDX-License-Identifier: Apache-2.0
"""Compiled, captured and exported steps."""
