"""Regularizers of features: terms on the vectors that one layer gives for each target."""
