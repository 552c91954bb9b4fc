"""LayerNorm, RMSNorm, GroupNorm, ghost batch norm and their fused residual forms."""
