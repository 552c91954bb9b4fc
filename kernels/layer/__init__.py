"""Layers with weights: linear, convolution, embedding, tied."""
