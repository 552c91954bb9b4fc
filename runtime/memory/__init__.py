"""Memory: what there is of it, what a run takes, and passes that run out of it."""
