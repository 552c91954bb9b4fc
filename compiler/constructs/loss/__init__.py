"""Losses: what a step minimises."""
