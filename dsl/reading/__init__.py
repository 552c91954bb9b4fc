"""Tree -> value, by the type of the field; the Construct base."""
