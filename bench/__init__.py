"""Benchmarks: `python -m bench` lists them, each takes --quick and --json PATH."""
