"""The hardware of a run: which device it trains on, and in which precision."""
