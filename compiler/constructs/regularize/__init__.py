"""Regularizers: terms added to the loss and noise added to the forward pass."""
