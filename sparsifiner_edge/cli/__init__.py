"""The command line: one file per command; each parses, calls one function of the package, and prints.

Options that a command only passes on have the names of that function's arguments.
"""
