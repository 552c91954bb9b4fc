"""Specs in the loops of other libraries, one file each: the library must be installed."""
