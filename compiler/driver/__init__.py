"""The verbs: compile, plan, train, verify, inspect, load."""
