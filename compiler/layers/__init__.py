"""Layers that can be measured or changed: the kinds found on disk, and how they are bound in the module tree."""
