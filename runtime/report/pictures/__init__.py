"""Pictures of what clauses measure: fitted curves, cosines, reliability, matrices."""
