"""Pictures and tables of noise scales in finished runs."""
