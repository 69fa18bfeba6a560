# SPDX-License-Identifier: Apache-2.0
"""Skipping the stack of blocks: its residual is predicted instead of running the blocks."""
