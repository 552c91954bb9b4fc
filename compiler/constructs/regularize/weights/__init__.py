"""Regularizers of the weights: penalties, averages and changes of them."""
