"""One optimizer step: actions, phases, rules, optimizer, update masks, replicas."""
