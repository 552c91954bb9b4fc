"""A torch optimizer, whoever wrote it: its state under parameter names, and its modes for training and evaluation."""
