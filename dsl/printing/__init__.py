"""Value and tree -> canonical text; reference pages."""
