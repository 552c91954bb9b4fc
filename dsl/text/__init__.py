"""The text of a spec and what is said of it: places, closed vocabularies, diagnostics and how they are shown."""
