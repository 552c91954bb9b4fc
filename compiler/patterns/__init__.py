"""What operators of a captured graph compute: arithmetic, norms, parts of an axis, and the memory they share."""
