"""What a spec can hold: durations, expressions, selectors; pure data."""
