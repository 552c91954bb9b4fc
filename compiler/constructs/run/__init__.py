"""Runs: how long, how often to evaluate and save."""
