"""What is known of a model before anything is decided: inventory, roles, selection, import, the meta device."""
