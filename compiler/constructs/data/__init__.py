"""Data: where the examples come from."""
