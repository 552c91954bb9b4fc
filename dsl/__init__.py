"""Words: text to checked spec. Imports neither torch nor any other layer."""
