"""What is on disk: checkpoints, JSON lines, the run folder; and random streams that make resuming exact."""
