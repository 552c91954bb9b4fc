"""What operators of a captured graph compute: elementary arithmetic, norms, and each part of an axis from parts."""
