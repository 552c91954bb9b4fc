"""Bind a spec to the inventory of a model: targets, claims, effects, signals, units."""
