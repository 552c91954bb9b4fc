"""Graphs: capture, the forward graph, differentiation, the step graph, listing, saving."""
