"""Checkpoints with synthetic weights, in the real file's structure."""
