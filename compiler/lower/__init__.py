"""The mechanisms a construct may call, and the assembly of what they collect."""
