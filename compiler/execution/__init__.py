"""One micro-batch: the model bound for a step, run by its modules or as a graph."""
