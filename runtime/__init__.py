"""Runtime: the parts of a training run, from the clock to the report."""
