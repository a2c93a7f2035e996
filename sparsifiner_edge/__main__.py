"""`python -m sparsifiner_edge`."""

from sparsifiner_edge.cli.main import main

main()
