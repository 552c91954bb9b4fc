"""The program: its step, its state, what it saves."""
