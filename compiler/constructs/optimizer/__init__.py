"""Optimizers: the update of parameters from their gradients."""
