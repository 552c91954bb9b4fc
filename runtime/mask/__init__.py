"""Masks: which entries of a parameter train, how they are chosen, and the actions that make a step obey."""
