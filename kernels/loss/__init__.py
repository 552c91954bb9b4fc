"""Cross-entropy with a consistency term."""
