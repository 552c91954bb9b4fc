"""Replays: passes of step graphs that are recorded once and replayed, as CUDA graphs, with the next batches."""
