"""Observers of the weights, and of what a model is as its weights grow."""
