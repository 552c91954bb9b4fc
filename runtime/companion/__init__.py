"""Companions: another module beside the user's model, and weights that evaluation uses in place of the trained ones."""
