"""One TOML file per board; `sparsifiner_edge.profiles.board` reads and checks them."""
