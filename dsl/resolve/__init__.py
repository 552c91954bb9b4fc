"""Trees + catalog -> Spec: includes, lets, clauses, checks."""
