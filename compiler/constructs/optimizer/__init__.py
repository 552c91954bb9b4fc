"""Optimizers: from gradients to new parameters."""
