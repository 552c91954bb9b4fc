"""Files of a run: checkpoints, JSON lines, the folder; and random streams, which make resuming exact."""
