"""Spec + inventory -> Binding: targets, claims, effects, signals, units."""
