"""Measuring one bundle, or two in turn: a process for each, blocks of queries, memory, layers, and what else ran."""
