"""Regularizers of what the model gives: terms on its outputs, and noise on those of its layers."""
