"""Models: the module that a run trains."""
