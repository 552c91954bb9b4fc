"""What a spec can hold: durations, ranges, expressions, selectors. Pure data."""
