"""One optimizer step: actions and their phases, rules, the optimizer, replicas."""
