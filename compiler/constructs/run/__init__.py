"""Runs: length, seed, evaluations and checkpoints."""
