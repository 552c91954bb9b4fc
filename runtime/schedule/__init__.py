"""Clock, expressions of it, schedule functions."""
