"""What a user asks for: compile, plan, train, verify, inspect, load."""
