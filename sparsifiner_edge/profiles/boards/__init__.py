"""Reading and checking boards, one TOML file each: `profiles/boards` at the root."""
