"""One optimizer step: actions and their phases, the optimizer, replicas."""
