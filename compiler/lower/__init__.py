"""The mechanisms that a construct may ask for, and the assembly of what was asked."""
