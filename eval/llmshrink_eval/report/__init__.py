"""What an evaluation leaves to read: table.md and report.html."""

from llmshrink_eval.report.summary import sentences
from llmshrink_eval.report.write import write_report

__all__ = ["sentences", "write_report"]
