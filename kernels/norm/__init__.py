"""LayerNorm, RMSNorm and GroupNorm, also of a sum."""
