"""The lowered method as data: the compiler's intermediate representation between a bound spec and a program."""
