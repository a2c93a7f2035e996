"""The demonstration, and the weights and images that other packages ship for it."""
