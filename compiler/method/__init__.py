"""The lowered method as data: the form between a binding and a program."""
