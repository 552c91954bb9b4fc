"""Layers with weights: linear, convolution, embedding, and an embedding tied to its head."""
