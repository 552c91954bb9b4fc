"""Batches, the order of samples, and which samples a batch holds."""
