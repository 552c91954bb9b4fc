"""Published findings, checked again by training: each script says what it expects and writes what it finds."""
