"""What is sound: a step whose loss and gradient are finite and count once, and weights and optimizer state that are."""
