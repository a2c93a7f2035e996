"""One TOML file per board; `sparsifiner_edge.profiles.boards.board` reads and checks them."""
