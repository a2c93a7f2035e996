"""Bundle format: manifest, file hashes, signature, golden pair, engines and compiled kernels."""
