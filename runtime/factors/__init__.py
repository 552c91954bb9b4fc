"""Factors that follow measured figures: how these become factors, what a control changes, the action that measures."""
