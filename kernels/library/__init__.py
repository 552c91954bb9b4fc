"""How an operator is registered and what contracts operators share."""
