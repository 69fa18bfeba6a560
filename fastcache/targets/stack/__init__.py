"""Skipping the stack of blocks: its residual is predicted instead of running the blocks."""
