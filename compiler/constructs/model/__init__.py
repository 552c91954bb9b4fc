"""Models: where the module to train comes from."""
