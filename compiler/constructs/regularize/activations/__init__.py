"""Regularizers of the inputs and activations: noise on them, and mixtures of them."""
