"""Normalizations: how a norm layer takes its statistics."""
