"""Batch normalisation over ghost batches."""
