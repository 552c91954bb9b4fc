"""From a tree to values, by the type of the field; the base class of constructs."""
