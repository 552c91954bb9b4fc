"""Abstract kinds: what all constructs of one kind share."""
