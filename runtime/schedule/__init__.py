"""The clock, durations on it, and schedules."""
