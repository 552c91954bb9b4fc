"""The command line: one module per verb, each with `register(app)`; app.py dispatches."""
