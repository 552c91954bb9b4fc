"""A package of somebody else, with a construct of every kind that the compiler can serve. Its test installs a copy."""
