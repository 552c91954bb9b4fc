"""How operators are registered, and the contracts they share."""
