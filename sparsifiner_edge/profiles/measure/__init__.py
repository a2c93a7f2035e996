"""Measurement of one bundle, or of two in turn: worker processes, blocks of queries, memory, layers and other load."""
