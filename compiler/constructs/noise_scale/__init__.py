"""Noise scales: how noisy the gradient is, measured as it arrives."""
