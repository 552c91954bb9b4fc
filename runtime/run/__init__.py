"""A run: the training loop, its records, display and summary."""
