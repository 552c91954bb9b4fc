"""A run: the loop, its interface, the live display, signals of the process, the summary."""
