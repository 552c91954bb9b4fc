"""The plan and its tables."""
