# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m bench` lists them, each takes --quick and --json PATH."""
