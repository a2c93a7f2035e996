from sparsifiner_edge.cli.main import main

main()
