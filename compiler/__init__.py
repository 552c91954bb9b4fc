"""The compiler: from a checked spec and a model to a program."""
