"""Data: the examples that a run trains on, and the batch."""
