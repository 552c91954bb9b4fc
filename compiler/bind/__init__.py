"""From a spec and an inventory to a binding: targets, claims, effects, signals, units."""
