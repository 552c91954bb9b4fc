"""Counter-based random numbers, and multiplicative noise."""
