"""Pictures of what several clauses measure: fitted curves, cosines."""
