"""Loading and validation of boards, which are TOML files in `profiles/boards` at the root of the repository."""
