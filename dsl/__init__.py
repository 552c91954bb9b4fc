"""The language: from text to a checked spec. Imports neither torch nor another package of trainc."""
