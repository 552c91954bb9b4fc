"""Influence: what training on one example does to the loss of another, from the checkpoints of a run."""
