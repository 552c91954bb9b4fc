"""What is known of a model before a spec is bound to it: inventory, roles, selection, how it is built."""
