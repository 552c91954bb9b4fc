"""Source texts and places in them, the fixed word lists of the language, and diagnostics and how they are shown."""
