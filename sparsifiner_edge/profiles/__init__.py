"""Measuring a bundle (`profile`), and estimating it for a board that is not here (`estimate`)."""
