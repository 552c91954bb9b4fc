"""The clock, time spans, gates, expressions and schedules."""
