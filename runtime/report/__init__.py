"""What is shown of runs: numbers as text, tables and pictures."""
