"""From values and trees to canonical text; the pages on constructs and diagnostics."""
