"""What is on disk: checkpoints, JSON lines, the folder of a run; and the random streams that make resuming exact."""
