"""Learning-rate policies: factors on the rates of parameters."""
