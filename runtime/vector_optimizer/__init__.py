"""Optimizers that move all parameters as one vector: searches along lines, and particles."""
