"""Measurement of a bundle (`profile`) and its estimate for a board that is not available (`estimate`)."""
