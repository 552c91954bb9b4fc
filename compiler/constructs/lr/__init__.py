"""Learning-rate policies: who moves how fast."""
