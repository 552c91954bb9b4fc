"""Dynamic sparse training: masks that are sparse from the start, and move while a model trains."""
