"""The clock, time spans on it, and schedules."""
