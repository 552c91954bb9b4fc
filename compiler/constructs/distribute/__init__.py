"""Distribution: what several replicas exchange, and when."""
