"""Starts that are learned over tasks: many short runs of one spec, each on data of its own."""
