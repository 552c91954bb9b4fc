"""Every rule a diagnostic can name."""

RULES: dict[str, object] = {}
