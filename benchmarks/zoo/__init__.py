"""Small random models of many architectures, every construct on each of them, and what is checked of three steps."""
