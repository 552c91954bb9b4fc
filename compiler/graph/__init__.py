"""Graphs: forward graph, capture front ends, differentiation, step graph, listing, serialisation."""
