"""Models and data for the example specs; `"examples.models:gpt"` names them in a spec."""
