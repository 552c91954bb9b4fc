"""The program: capture, execution, the step, its state, distribution."""
