"""What the parts of a model are and where they stand: roles, blocks, and levels from the input to the head."""
