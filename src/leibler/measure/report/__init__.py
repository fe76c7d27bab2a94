"""The HTML report of a run, or of several runs side by side.

Examples:
    >>> from leibler.measure.report import write_report
"""

from leibler.measure.report.page import write_report

__all__ = ["write_report"]
