"""What every room of the compiler may use: the catalog of constructs, and the exceptions."""
