"""Batches, and the order of samples."""
