"""Perturbations: parameters or inputs changed before the forward pass and restored after backward."""
