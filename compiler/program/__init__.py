"""The program: capture, execution, state, distribution."""
