"""Losses: what training minimizes."""
