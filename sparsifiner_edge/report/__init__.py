"""One HTML page from result files: what was measured, what it means, and how to measure it again."""

from sparsifiner_edge.report.page import write_report

__all__ = ["write_report"]
