"""Distribution: what replicas exchange, and when."""
