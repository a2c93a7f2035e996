"""Everything about a bundle: manifest, hashes, signature, golden pair, engines and kernels in it."""
