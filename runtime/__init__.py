"""Time: a program, run one training step at a time."""
