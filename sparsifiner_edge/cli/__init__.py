"""Command line: one module per command.

Each command parses its options, calls one function of the package and prints the result. Options that are passed on
unchanged have the names of that function's arguments.
"""
