"""Batches, the order of samples, and reading them."""
