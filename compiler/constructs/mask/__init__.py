"""Masks: which entries of a parameter are trained."""
