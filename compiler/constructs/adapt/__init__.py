"""Adapters: parameters added to a model, and merged back."""
