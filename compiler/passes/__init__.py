"""Graph passes: small named rewrites of the captured forward graph, each checked after it ran."""
