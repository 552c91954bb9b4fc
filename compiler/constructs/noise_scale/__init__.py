"""Noise scales: the noise of the gradient, measured during training."""
